"""What a fit will need, from the headers of the sources' files alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mergekit_dam.config import Settings
from mergekit_dam.data import SourceData
from mergekit_dam.fit.device import choose_dtype
from mergekit_dam.fit.memory import Needs, needs
from mergekit_dam.fit.place import Place, groups_of, place
from mergekit_dam.fit.start import counts, trained_tensors
from mergekit_dam.headers import HeaderShapes
from mergekit_dam.model import Skeleton, build_skeleton
from mergekit_dam.plan import Plan


@dataclass(frozen=True)
class Forecast:
    """What a fit will need here."""

    numbers: dict[str, int]  # output tensor -> numbers that its coefficients have
    trained: int  # of these numbers
    dtype: torch.dtype  # of the forward pass
    sizes: dict[str, int]  # output tensor -> bytes that the fit holds for it
    needs: Needs  # of a step
    place: Place


def merged_skeleton(plan: Plan, shapes: HeaderShapes) -> Skeleton:
    """Raises DamError where the model cannot be built."""
    return build_skeleton(
        plan.model_config,
        set(shapes.names()),
        trust_remote_code=plan.options.trust_remote_code,
    )


def foresee(
    plan: Plan,
    settings: Settings,
    shapes: HeaderShapes,
    skeleton: Skeleton,
    device: str,
    data: Sequence[SourceData],  # of each source, where all were read
) -> Forecast:
    numbers = counts(plan, settings, shapes, skeleton)
    trained = sum(numbers.get(name, 0) for name in trained_tensors(skeleton, settings))
    dtype = choose_dtype(settings, shapes.dtypes(), device)
    sizes = held(shapes, settings, skeleton)
    longest = longest_rows(plan, settings, data)
    found = needs(
        plan.model_config,
        skeleton,
        dtype,
        [settings.batch_size * length for length in longest],
        settings.objective,
        trained,
        longest=max(longest),
        trust_remote_code=plan.options.trust_remote_code,
    )
    where = place(settings, device, found, sum(sizes.values()), groups_of(skeleton, sizes))
    return Forecast(numbers, trained, dtype, sizes, found, where)


def longest_rows(plan: Plan, settings: Settings, data: Sequence[SourceData]) -> list[int]:
    """Tokens of each source's longest row, or of one as long as settings and model let it be."""
    if len(data) == len(plan.teachers):
        return [max(len(row) for row in own.train) for own in data]
    positions = getattr(plan.model_config.get_text_config(), "max_position_embeddings", None)
    return [min(settings.max_length, positions or settings.max_length)] * len(plan.teachers)


def held(shapes: HeaderShapes, settings: Settings, skeleton: Skeleton) -> dict[str, int]:
    """Output tensor -> bytes that a fit holds for it."""
    return shapes.bytes(
        {name: role.shape for name, role in skeleton.roles.items()},
        base=settings.formula == "task_vectors",
        prepared=settings.sparsify != "task_arithmetic",
    )
