"""Tensors where they lie, and the table in a GPU's memory that tells a kernel of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from mergekit_dam.inputs import Inputs, Together
from mergekit_dam.kernels.groups import (
    ALIGNED,
    DTYPES,
    Group,
    Told,
    merged_groups,
    summed_groups,
    wide,
)

TOGETHER = 4  # sources whose sums fit into registers


@dataclass(frozen=True)
class Launch:
    """One start of a kernel, for some of a group's sources."""

    group: Group
    constants: dict  # what the kernel is compiled for
    addresses: tuple[int, ...]  # of bases and sources, the table's last rows
    places: Sequence[int] = ()  # of each member's coefficients among all sums

    def table(
        self, results: Sequence[int], factors: Sequence[int], device: torch.device
    ) -> Tensor:  # [(9 + n) * a power of 2], see `programs`
        """With what differs between calls, for each of the group's members."""
        rest = [0] * (self.group.width - len(results))
        rows = (self.group.division, results, rest, factors, rest, self.addresses)
        # From pageable memory so small a copy is staged at once, and nobody waits for the GPU.
        table = torch.tensor([*chain(*rows)], dtype=torch.int64, device="cpu")
        return table.to(device, non_blocking=True)


class Placed:
    """The inputs of tensors that are needed together. What a kernel is told of them does not change
    while they stay where they are, so it is found once for each shape of coefficients."""

    def __init__(self, inputs: Sequence[Inputs], *, is_sum: bool):
        parts = [own.parts if is_sum else (own.parts[0], own.base) for own in inputs]
        self.sources = [tuple(s.contiguous() for s in sources) for sources, _ in parts]
        self._bases = [None if base is None else base.contiguous() for _, base in parts]
        self.is_copied = not all(
            one is other
            for (sources, base), own, origin in zip(parts, self.sources, self._bases, strict=True)
            for one, other in zip((*sources, base), (*own, origin), strict=True)
        )
        self.shapes = [sources[0].shape for sources in self.sources]
        self.device = self.sources[0][0].device
        self._is_prepared = [own.prepared is not None and not is_sum for own in inputs]
        self._addresses = [
            tuple(0 if t is None else t.data_ptr() for t in (base, *sources))
            for base, sources in zip(self._bases, self.sources, strict=True)
        ]
        self._found: dict[tuple, list] = {}

    def merging(
        self,
        shapes: Sequence[torch.Size],  # of the coefficients [N, *B]
        others: Sequence[torch.dtype],  # of the weights as they are stored
        written: Sequence[torch.dtype],  # what they are rounded to before
        *,
        is_aligned: bool,  # whether results and coefficients are
    ) -> Sequence[Launch]:
        key = (tuple(shapes), tuple(others), tuple(written), is_aligned)
        if key not in self._found:
            self._found[key] = [self._merge(group) for group in merged_groups(self._told(*key))]
        return self._found[key]

    def summing(
        self,
        shapes: Sequence[torch.Size],
        others: Sequence[torch.dtype],  # of the weights' gradients
        most: int,  # tiles of a program
        fewest: int,  # programs
        *,
        is_aligned: bool,  # whether these are
    ) -> Sequence[tuple[Group, Sequence[Launch]]]:
        """Groups, and the launches of each, one for some of the sources."""
        key = (tuple(shapes), tuple(others), most, fewest, is_aligned)
        if key not in self._found:
            told = self._told(key[0], key[1], key[1], is_aligned)
            self._found[key] = [
                (group, [self._sum(group, n) for n in range(0, len(group.kind.dtypes), TOGETHER)])
                for group in summed_groups(told, most, fewest)
            ]
        return self._found[key]

    def _told(
        self,
        shapes: Sequence[torch.Size],
        others: Sequence[torch.dtype],
        written: Sequence[torch.dtype],
        is_aligned: bool,
    ) -> tuple[Told, ...]:
        return tuple(
            Told(
                self.shapes[n], shapes[n][1:], tuple(source.dtype for source in sources),
                None if base is None else base.dtype, others[n], written[n], self._is_prepared[n],
                is_aligned and not any(address % ALIGNED for address in self._addresses[n]),
            )
            for n, (base, sources) in enumerate(zip(self._bases, self.sources, strict=True))
        )  # fmt: skip

    def _merge(self, group: Group) -> Launch:
        kind = group.kind
        own = {"WRITTEN": DTYPES[kind.written], "IS_PREPARED": kind.is_prepared}
        return Launch(group, constants(group) | own, self._rows(group))

    def _sum(self, group: Group, begin: int) -> Launch:
        chosen = slice(begin, begin + TOGETHER)
        rows, places = self._rows(group, chosen), group.places(begin)
        return Launch(group, constants(group, chosen), rows, places)

    def _rows(self, group: Group, chosen: slice = slice(None)) -> tuple[int, ...]:
        """Addresses of bases and chosen sources."""
        rest = [0] * (group.width - len(group.members))
        bases, *sources = zip(*(self._addresses[n] for n in group.members), strict=True)
        return tuple(chain(*([*row, *rest] for row in (bases, *sources[chosen]))))


def constants(group: Group, chosen: slice = slice(None)) -> dict:
    """What both kernels are compiled for, that are to work on some of the sources."""
    kind, tile = group.kind, group.tile
    return {
        "WIDTH": group.width, "DTYPES": tuple(DTYPES[dtype] for dtype in kind.dtypes[chosen]),
        "BASE_DTYPE": None if kind.base is None else DTYPES[kind.base],
        "OTHER": DTYPES[kind.other], "WIDE": DTYPES[wide(kind.dtypes[0])],
        "TILE_SUMMED": tile[0], "TILE_KEPT": tile[1],
        "IS_SIDE": kind.is_side, "IS_ALIGNED": kind.is_aligned,
    }  # fmt: skip


def placed(inputs: Sequence[Inputs], *, is_sum: bool) -> Placed:
    """Found once for inputs that stay together, but for what had to be copied."""
    known = inputs.known if isinstance(inputs, Together) else {}
    if (found := known.get(is_sum)) is None:
        found = Placed(inputs, is_sum=is_sum)
        if not found.is_copied:
            known[is_sum] = found
    return found
