"""mergekit's own parameters: which have no effect, and which are no numbers or ranges."""

import reprlib
from collections.abc import Iterator
from typing import Any

from mergekit.config import MergeConfiguration

from mergekit_dam.config import Settings, parts_of

NUMBERS = ("weight", "density", "gamma", "epsilon", "lambda")


def parameter_problems(merge: MergeConfiguration, settings: Settings) -> Iterator[str]:
    """Parameters of mergekit's methods that this fit would pass over in silence."""
    if settings.sparsify != "task_arithmetic":
        return
    given = {name for part in _parameters(merge) for name in part or {}}
    for name in sorted(given & {"density", "gamma", "epsilon", "rescale", "int8_mask"}):
        yield (
            f"`{name}` has no effect: set `dam.formula: task_vectors` and `dam.sparsify` to the "
            "method whose parameter it is, or remove it"
        )
    if settings.formula == "weights" and "lambda" in given:
        yield "`lambda` has no effect on `dam.formula: weights`: remove it, or use task_vectors"


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
    """Values of mergekit's numeric parameters that are none."""
    for part in _parameters(merge):
        for name in NUMBERS:
            for value in _values((part or {}).get(name)):
                if not _is_number(value):
                    yield f"`{name}` is {reprlib.repr(value)}, which is no number: give one"


def _is_number(value: Any) -> bool:
    """YAML takes 1e-3 for a text, and mergekit takes it for the number."""
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


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
