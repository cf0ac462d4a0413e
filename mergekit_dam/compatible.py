"""Sources that mergekit cannot put together, told apart by their configs alone.

mergekit refuses them too; here the sentence names the models and the remedy.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from mergekit.architecture import ModelArchitecture, arch_info_for_config
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_dam.config import parts_of
from mergekit_dam.config.recipe import match_reference
from mergekit_dam.differences import config_differences
from mergekit_dam.errors import DamError

DEQUANTISE = (
    "give the model that it was made of, or save it dequantised (transformers loads FP8, MXFP4 and "
    "compressed-tensors with `dequantize=True` in the quantisation's config; bitsandbytes and "
    "HIGGS models have `model.dequantize()`)"
)


def require_compatible(merge: MergeConfiguration, options: MergeOptions) -> None:
    """Raise DamError for a source listed twice, for quantised models, for other architectures and
    other depths, and for modules that are too many or too few.

    Shapes are not compared: they are in the weights' headers, which `check` reads.
    """
    lists = list(_input_lists(merge))
    for models in lists:
        _require_distinct(models)
    base = [merge.base_model] if merge.base_model else []
    try:
        configs = {
            model: model.config(trust_remote_code=options.trust_remote_code)
            for model in [*itertools.chain(*lists), *base]
        }
        _require_unquantised(configs)
        architectures = {model: arch_info_for_config(config) for model, config in configs.items()}
    except DamError:
        raise
    except Exception:  # a model that cannot be opened is named by the planning
        return
    if not all(architectures.values()):  # mergekit infers one from the tensors' names
        return
    if not options.allow_crimes:
        _require_one_architecture(configs, architectures)
    architecture = next(iter(architectures.values()))
    _require_all_modules(merge, architecture, next(iter(configs.values())))
    for name, models in _whole_models(merge, architecture):
        _require_one_depth(name, {model: configs[model] for model in models}, architectures)


def differing_shapes(
    name: str, shapes: Mapping[ModelReference, Sequence[int]], vocabulary_axis: int | None
) -> str | None:
    """What to say where the models' shapes of one tensor differ."""
    if len({tuple(shape) for shape in shapes.values()}) < 2:
        return None
    axis, remedy = vocabulary_axis, "choose models of one architecture and size"
    if axis is not None and len({(*s[:axis], *s[axis + 1 :]) for s in shapes.values()}) == 1:
        remedy = "align the vocabularies, for example `tokenizer: {source: union}`"
    listed = ", ".join(f"{model} {list(shape)}" for model, shape in shapes.items())
    return f"the sources' shapes of {name} differ ({listed}): {remedy}"


def _input_lists(merge: MergeConfiguration) -> Iterator[Sequence[ModelReference]]:
    """The models whose tensors go into one output tensor together."""
    for part in parts_of(merge):
        yield [entry.model for entry in part.models or ()]
        for piece in part.slices or ():
            yield [source.model for source in piece.sources]


def _require_distinct(models: Sequence[ModelReference]) -> None:
    for index, model in enumerate(models):
        if (first := match_reference(str(model), models[:index])) is not None:
            other = "" if model == first else f" (as {first}, too)"
            raise DamError(
                f"The model {model} is listed twice{other}, and mergekit takes every source once: "
                "keep one entry, to which the fit can give as much weight as two."
            )


def _require_unquantised(configs: Mapping[ModelReference, PretrainedConfig]) -> None:
    """Of quantised weights mergekit would take the codes for the numbers that they stand for."""
    for model, config in configs.items():
        for part in (config, config.get_text_config()):
            if settings := getattr(part, "quantization_config", None):
                given = settings if isinstance(settings, Mapping) else vars(settings)
                method = given.get("quant_method", "by an unnamed method")
                raise DamError(
                    f"{model} is quantised ({method}, says `quantization_config` of its "
                    f"config.json), and a merge needs its weights as numbers: {DEQUANTISE}; where "
                    "they are numbers already, remove that key."
                )


def _require_one_architecture(
    configs: dict[ModelReference, PretrainedConfig],
    architectures: dict[ModelReference, ModelArchitecture],
) -> None:
    first, *others = architectures
    other = next((model for model in others if architectures[model] != architectures[first]), None)
    if other is None:
        return
    example = _example(architectures, first, other, configs)
    remedy = "choose models of one architecture"
    if not example:
        remedy = "their tensors have the same names, so --allow-crimes may merge them"
    raise DamError(
        f"The models have different architectures ({first} is {configs[first].architectures[0]}, "
        f"{other} is {configs[other].architectures[0]}{example}): {remedy}."
    )


def _example(architectures, first: ModelReference, other: ModelReference, configs) -> str:
    """A tensor that one of two architectures has and the other lacks, if there is one."""
    names = {
        model: {w.name for w in architectures[model].all_weights(configs[model]) if not w.optional}
        for model in (first, other)
    }
    for one, two in ((first, other), (other, first)):
        for name in sorted(names[one] - names[two]):
            return f", and only {one} has {name}"
    return ""


def _require_all_modules(
    merge: MergeConfiguration, architecture: ModelArchitecture, config: PretrainedConfig
) -> None:
    """mergekit writes the modules that are listed, and a model with half of them is none."""
    if not merge.modules:
        return
    name, known = config.architectures[0], ", ".join(architecture.modules)
    for module in merge.modules:
        if module not in architecture.modules:
            raise DamError(f"`modules.{module}` is no module of {name}: they are {known}.")
    if lacking := [module for module in architecture.modules if module not in merge.modules]:
        raise DamError(
            f"`modules` lacks {' and '.join(lacking)}, without which the merge would be no whole "
            f"{name} (its modules are {known}): add them, with `models` whose `weight` is the rule "
            "for them."
        )


def _whole_models(
    merge: MergeConfiguration, architecture: ModelArchitecture
) -> Iterator[tuple[str, Iterable[ModelReference]]]:
    """The name of each module that is merged with all its layers, and the models it takes."""
    base = [merge.base_model] if merge.base_model else []
    if merge.models:
        for name in architecture.modules:
            yield name, dict.fromkeys([entry.model for entry in merge.models] + base)
    for name, module in (merge.modules or {}).items():
        if module.models and name in architecture.modules:
            yield name, dict.fromkeys([entry.model for entry in module.models] + base)


def _require_one_depth(
    module: str,
    configs: dict[ModelReference, PretrainedConfig],
    architectures: dict[ModelReference, ModelArchitecture],
) -> None:
    depths = {
        model: architectures[model].modules[module].architecture.num_layers(config)
        for model, config in configs.items()
    }
    shallow, deep = min(depths, key=depths.get), max(depths, key=depths.get)
    if depths[shallow] == depths[deep]:
        return
    architecture = architectures[deep].modules[module].architecture
    name = architecture.layer_weights(depths[shallow], configs[deep])[0].name
    raise DamError(
        f"The models have different numbers of layers ({deep} has {depths[deep]}, {shallow} "
        f"{depths[shallow]} and no {name}): choose models of one size, or the layers to take "
        "from each with `slices:`."
    )


def require_one_config(merge: MergeConfiguration, options: MergeOptions) -> None:
    """Without a base mergekit takes the merge's config from a model at random; that is well
    where they are alike."""
    if merge.base_model is not None:
        return
    first, *others = sorted(merge.referenced_models(), key=str)
    trusts = options.trust_remote_code
    config = first.config(trusts)
    is_aligned = merge.tokenizer or merge.tokenizer_source
    for other in others:
        found = other.config(trusts)
        # The number of layers is the slices' to say.
        keys = [
            key
            for key in config_differences(config, found, trust_remote_code=trusts)
            if not key.endswith(("num_hidden_layers", "layer_types"))
        ]
        sizes = (c.get_text_config().vocab_size for c in (config, found))
        if not is_aligned and len(set(sizes)) > 1:  # embeddings are to be cut
            keys.append("vocab_size")
        if keys:
            raise DamError(
                f"The configs of {first} and {other} differ in {', '.join(keys[:3])}, and mergekit "
                "would take either for the merge: set `base_model` to the one that counts."
            )
