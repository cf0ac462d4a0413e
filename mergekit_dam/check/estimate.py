"""What a fit will need, from the plan and the headers alone."""

from dataclasses import dataclass
from math import prod

from mergekit_dam.check.headers import HeaderShapes
from mergekit_dam.config.settings import Settings
from mergekit_dam.formula import coefficient_shape
from mergekit_dam.model import Skeleton, build_skeleton
from mergekit_dam.plan import Plan


@dataclass(frozen=True)
class Estimate:
    """What a merge needs; bytes."""

    sources: int
    output_tensors: int
    trained_tensors: int
    coefficients: int  # numbers in the file
    trained: int  # of them trained
    weights: int  # of all sources together
    activations: int  # of a step
    file: int

    def __str__(self) -> str:
        return (
            f"{self.sources} sources, {self.output_tensors} output tensors, "
            f"{self.trained_tensors} of them with trained coefficients\n"
            f"{self.coefficients:,} coefficients, {self.trained:,} of them trained\n"
            f"memory: weights {_size(self.weights)}, activations about {_size(self.activations)}; "
            f"coefficient file {_size(self.file)}"
        )


def estimate(plan: Plan, settings: Settings, shapes: HeaderShapes) -> Estimate:
    """Raises DamError where the model cannot be built."""
    skeleton = build_skeleton(
        plan.model_config,
        set(shapes.names()),
        trust_remote_code=plan.options.trust_remote_code,
    )
    counts = {
        name: prod(_coefficient_shape(name, skeleton, settings)) * len(plan.sources)
        for name in skeleton.roles
    }
    trained = {n for n, role in skeleton.roles.items() if getattr(settings.train, role.kind)}
    return Estimate(
        sources=len(plan.sources),
        output_tensors=len(counts),
        trained_tensors=len(trained),
        coefficients=sum(counts.values()),
        trained=sum(counts[name] for name in trained),
        weights=shapes.bytes(),
        activations=_activations(plan, settings),
        file=4 * sum(counts.values()),
    )


def _coefficient_shape(name: str, skeleton: Skeleton, settings: Settings) -> tuple[int, ...]:
    role = skeleton.roles[name]
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
