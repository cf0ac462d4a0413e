"""What a fit will need, from the plan and the headers alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from mergekit_dam.check.headers import HeaderShapes
from mergekit_dam.config.settings import Settings
from mergekit_dam.formula import coefficient_shape
from mergekit_dam.model import Role, Skeleton, build_skeleton
from mergekit_dam.plan import Plan


@dataclass(frozen=True)
class Estimate:
    """What a merge needs; bytes."""

    sources: int
    output_tensors: int
    trained_tensors: int
    unreached_tensors: int  # in the file and the merge, but no text reaches them
    coefficients: int  # numbers in the file
    trained: int  # of them trained
    weights: int  # of all sources together
    activations: int  # of a step
    file: int

    def __str__(self) -> str:
        unreached = (
            f"{self.unreached_tensors} output tensors keep the plain average, since no text "
            "reaches them\n"
        )
        return (
            f"{self.sources} sources, {self.output_tensors} output tensors, "
            f"{self.trained_tensors} of them with trained coefficients\n"
            f"{unreached if self.unreached_tensors else ''}"
            f"{self.coefficients:,} coefficients, {self.trained:,} of them trained\n"
            f"memory: weights {_size(self.weights)}, activations about {_size(self.activations)}; "
            f"coefficient file {_size(self.file)}"
        )


def merged_skeleton(plan: Plan, shapes: HeaderShapes) -> Skeleton:
    """Raises DamError where the model cannot be built."""
    return build_skeleton(
        plan.model_config,
        set(shapes.names()),
        trust_remote_code=plan.options.trust_remote_code,
    )


def estimate(plan: Plan, settings: Settings, shapes: HeaderShapes, skeleton: Skeleton) -> Estimate:
    counts = {
        name: prod(_coefficient_shape(name, skeleton, settings, shapes)) * len(plan.sources)
        for name in shapes.names()
    }
    trained = {n for n, role in skeleton.roles.items() if getattr(settings.train, role.kind)}
    return Estimate(
        sources=len(plan.sources),
        output_tensors=len(counts),
        trained_tensors=len(trained),
        unreached_tensors=len(counts.keys() - skeleton.roles.keys()),
        coefficients=sum(counts.values()),
        trained=sum(counts[name] for name in trained),
        weights=shapes.bytes(),
        activations=_activations(plan, settings),
        file=4 * sum(counts.values()),
    )


def misfits(settings: Settings, shapes: HeaderShapes, skeleton: Skeleton) -> Iterator[str]:
    """What the merged model needs and the sources, which agree with each other, do not give."""
    for name, role in skeleton.roles.items():
        shape = shapes.shape(name)
        if shape is not None and shape != role.shape:
            yield (
                f"{name} has shape {list(shape)} in the sources, but config.json of the merge "
                f"makes it {list(role.shape)}: choose the `base_model` whose config fits"
            )
            break
    for rule in settings.granularity if not isinstance(settings.granularity, str) else ():
        if rule.filter not in (None, "*") and not any(rule.filter in n for n in shapes.names()):
            yield f"`dam.granularity`: no tensor's name has {rule.filter!r} in it"
    if settings.max_steps and not any(
        getattr(settings.train, role.kind) for role in skeleton.roles.values()
    ):
        yield "`dam.train` leaves no tensor of this model to train: switch a kind on"


def _coefficient_shape(
    name: str, skeleton: Skeleton, settings: Settings, shapes: HeaderShapes
) -> tuple[int, ...]:
    role = skeleton.roles.get(name, Role("linear", shapes.shape(name) or ()))
    return coefficient_shape(
        role.shape,
        settings.granularity_of(name),
        input_axis=role.input_axis,
        bias=role.kind == "bias",
    )


def _activations(plan: Plan, settings: Settings) -> int:
    """Rows of full length: each block's input, and the logits of merge and teacher with their
    log-probabilities and gradient, in float32."""
    config = plan.model_config.get_text_config()
    tokens = settings.batch_size * len(plan.sources) * settings.max_length
    hidden = tokens * config.hidden_size * (config.num_hidden_layers + 8)
    return 4 * (hidden + 4 * tokens * config.vocab_size)


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
