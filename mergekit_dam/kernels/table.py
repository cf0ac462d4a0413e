"""The table in a GPU's memory that tells a kernel of its tensors."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_dam.kernels.groups import ALIGNED, Group, Told


class Part(NamedTuple):
    """One tensor among those that go together."""

    told: Told
    factor: Tensor  # coefficients, or the weight's gradient
    base: Tensor | None
    sources: tuple[Tensor, ...]
    addresses: tuple[int, ...]  # of the factor, the base, and each source


def part_of(
    result: Tensor | None,  # the merged weight
    factor: Tensor,
    base: Tensor | None,
    sources: Sequence[Tensor],
    broadcast: Sequence[int],
    written: torch.dtype,
    *,
    is_prepared: bool = False,
) -> Part:
    sources = tuple([source.contiguous() for source in sources])
    base = None if base is None else base.contiguous()
    addresses = tuple([0 if t is None else t.data_ptr() for t in (factor, base, *sources)])
    own = addresses if result is None else (*addresses, result.data_ptr())
    told = Told(
        sources[0].shape, broadcast, tuple([source.dtype for source in sources]),
        None if base is None else base.dtype, (factor if result is None else result).dtype,
        written, is_prepared, not any([address % ALIGNED for address in own]),
    )  # fmt: skip
    return Part(told, factor, base, sources, addresses)


def table_of(
    group: Group,
    parts: Sequence[Part],  # its members
    results: Sequence[int],  # of each
    sources: slice = slice(None),
) -> Tensor:
    """[9 + n, a power of 2], see `programs`."""
    numbers, rest = list(group.division), [0] * (group.width - len(parts))
    each = [part.addresses for part in parts]
    factors, bases, *others = zip(*each, strict=True)
    for row in (results, factors, bases, *others[sources]):
        numbers += row
        numbers += rest
    # From pageable memory so small a copy is staged at once, and nobody waits for the GPU.
    table = torch.tensor(numbers, dtype=torch.int64, device="cpu").view(-1, group.width)
    return table.to(parts[0].factor.device, non_blocking=True)
