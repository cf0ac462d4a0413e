"""Parameters and settings: which have no effect, and which are no numbers or ranges."""

import math
import reprlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import pydantic
from mergekit import merge_methods
from mergekit.config import ConditionalParameter, MergeConfiguration

from mergekit_dam.config import Settings, parts_of
from mergekit_dam.config.settings import PRESETS

SPARSIFYING = {"density", "gamma", "epsilon", "rescale", "int8_mask"}
SWITCHES = ("normalize", "rescale", "int8_mask")
WITH_TEMPERATURE = ("kl", "reverse_kl", "jsd", "entropy")  # of the terms of the objective
NUMBERS = ("weight", "density", "gamma", "epsilon", "lambda")


def parameter_problems(merge: MergeConfiguration, settings: Settings) -> Iterator[str]:
    """Parameters of mergekit's methods that this fit would pass over in silence."""
    method, accepted = settings.sparsify, set()
    if method != "task_arithmetic":  # which would take a density, and leave all as it is
        accepted = {parameter.name for parameter in merge_methods.get(method).spec.parameters}
    given = {name for part in _parameters(merge) for name in part or {}}
    for name in sorted(given & SPARSIFYING - accepted):
        yield (
            f"`{name}` has no effect: set `dam.formula: task_vectors` and `dam.sparsify` to the "
            "method whose parameter it is, or remove it"
        )
    if settings.formula == "weights" and "lambda" in given:
        yield "`lambda` has no effect on `dam.formula: weights`: remove it, or use task_vectors"


def doubtful_settings(settings: Settings, start: str) -> Iterator[str]:
    """What a `dam:` block sets for nothing, or to its harm, of a fit that begins at `start`."""
    preset = PRESETS.get(settings.preset or "", {})
    given = settings.model_fields_set - preset.keys()
    terms = settings.objective.model_fields_set - preset.get("objective", {}).keys()
    if "basis" in given and settings.formula == "task_vectors":
        yield "`dam.basis` has no effect on `formula: task_vectors`"
    if "calibration" in given and start != "least_squares":
        yield f"`dam.calibration` has no effect on `start: {start}`"
    if "temperature" in terms and not any(getattr(settings.objective, n) for n in WITH_TEMPERATURE):
        terms = ", ".join(f"`{name}`" for name in WITH_TEMPERATURE)
        yield f"`dam.objective.temperature` has no effect without one of {terms}"
    if settings.compute_dtype == "float16" and settings.max_steps:
        yield (
            "`dam.compute_dtype: float16` loses small gradients, since losses are not scaled: "
            "`bfloat16` keeps them"
        )


def _parameters(merge: MergeConfiguration) -> Iterator[dict | None]:
    yield merge.parameters
    for part in parts_of(merge):
        yield part.parameters
        for model in part.models or ():
            yield model.parameters
        for piece in part.slices or ():
            yield piece.parameters
            yield from (source.parameters for source in piece.sources)


def number_problems(merge: MergeConfiguration) -> Iterator[str]:
    """Values of mergekit's parameters that are neither numbers nor switches, as they must be."""
    for part in _parameters(merge):
        for name in NUMBERS:
            for value in _values((part or {}).get(name)):
                if not _is_number(value):
                    yield f"`{name}` is {reprlib.repr(value)}, which is no finite number: give one"
        for name in SWITCHES:
            for value in _values((part or {}).get(name)):
                if not _is_switch(value):
                    yield f"`{name}` is {reprlib.repr(value)}: give true or false"


def _is_number(value: Any) -> bool:
    """YAML takes 1e-3 for a text, and mergekit takes it for the number."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _is_switch(value: Any) -> bool:
    """As mergekit reads it."""
    try:
        pydantic.TypeAdapter(bool).validate_python(value)
    except pydantic.ValidationError:
        return False
    return True


def filters_without_a_tensor(merge: MergeConfiguration, names: Collection[str]) -> Iterator[str]:
    """They may be meant for other models, or misspelt."""
    for part in _parameters(merge):
        for name, setting in (part or {}).items():
            for item in setting if isinstance(setting, list) else ():
                wanted = item.filter if isinstance(item, ConditionalParameter) else None
                if is_idle(wanted, names):
                    yield f"`{name}` has the filter {wanted!r}, which no tensor's name has in it"


def is_idle(wanted: str | None, names: Iterable[str]) -> bool:
    """Whether a filter, as mergekit matches it, has none of the names."""
    return wanted not in (None, "*") and not any(wanted in name for name in names)


def _values(setting: Any) -> Iterator[Any]:
    """Of a number, a gradient, or a list of filters with either."""
    if isinstance(setting, list | tuple):
        for item in setting:
            yield from _values(item)
    elif hasattr(setting, "value"):
        yield from _values(setting.value)
    elif setting is not None:
        yield setting


def range_problems(merge: MergeConfiguration) -> Iterator[str]:
    """Layers that end before they begin; those that a model lacks are found in its header."""
    for part in parts_of(merge):
        for index, piece in enumerate(part.slices or ()):
            for number, source in enumerate(piece.sources):
                start, end = source.layer_range
                if not 0 <= start < end:
                    yield (
                        f"`slices.{index}.sources.{number}.layer_range` is [{start}, {end}]: give "
                        "the first layer, from 0, and the one after the last"
                    )
