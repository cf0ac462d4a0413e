"""What a fit will need, from the headers of the sources' files alone."""

from collections.abc import Sequence

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


def foresee(
    plan: Plan, settings: Settings, data: Sequence[SourceData], device: str
) -> tuple[Needs, Place]:
    """Of a step, and where the fit keeps what it needs."""
    shapes = HeaderShapes(plan)
    skeleton = merged_skeleton(plan, shapes)
    found = step_needs(plan, settings, shapes, skeleton, device, data)
    return found, where(settings, shapes, skeleton, device, found)


def merged_skeleton(plan: Plan, shapes: HeaderShapes) -> Skeleton:
    """Raises DamError where the model cannot be built."""
    return build_skeleton(
        plan.model_config,
        set(shapes.names()),
        trust_remote_code=plan.options.trust_remote_code,
    )


def step_needs(
    plan: Plan,
    settings: Settings,
    shapes: HeaderShapes,
    skeleton: Skeleton,
    device: str,
    data: Sequence[SourceData],  # of each source, where all were read
) -> Needs:
    numbers = counts(plan, settings, shapes, skeleton)
    longest = longest_rows(plan, settings, data)
    return needs(
        plan.model_config,
        skeleton,
        computing_dtype(settings, shapes, device),
        [settings.batch_size * length for length in longest],
        settings.objective,
        sum(numbers.get(name, 0) for name in trained_tensors(skeleton, settings)),
        longest=max(longest),
        trust_remote_code=plan.options.trust_remote_code,
    )


def computing_dtype(settings: Settings, shapes: HeaderShapes, device: str) -> torch.dtype:
    return choose_dtype(settings, shapes.dtypes(), device)


def longest_rows(plan: Plan, settings: Settings, data: Sequence[SourceData]) -> list[int]:
    """Tokens of each source's longest row, or of one as long as settings and model let it be."""
    if len(data) == len(plan.teachers):
        return [max(len(row) for row in own.train) for own in data]
    positions = getattr(plan.model_config.get_text_config(), "max_position_embeddings", None)
    return [min(settings.max_length, positions or settings.max_length)] * len(plan.teachers)


def where(
    settings: Settings, shapes: HeaderShapes, skeleton: Skeleton, device: str, found: Needs
) -> Place:
    sizes = held(shapes, settings, skeleton)
    return place(settings, device, found, sum(sizes.values()), groups_of(skeleton, sizes))


def held(shapes: HeaderShapes, settings: Settings, skeleton: Skeleton) -> dict[str, int]:
    """Output tensor -> bytes that a fit holds for it."""
    return shapes.bytes(
        {name: role.shape for name, role in skeleton.roles.items()},
        base=settings.formula == "task_vectors",
        prepared=settings.sparsify != "task_arithmetic",
    )
