"""Which tensors go together in one start of a kernel, and how they are divided among its programs.

All that follows from shapes and dtypes is found once for a model's blocks, which are alike: for
each call it would take a processor longer than a GPU takes for a block's weights.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton.language as tl

from mergekit_dam.kernels.layout import MERGED, REMEMBERED, SUMMED, Layout, layout_of, power_of_2

ALIGNED = 16  # bytes of an address, and numbers of the axis side by side, for the widest loads
FEWEST, MOST = 8, 256  # tensors of a group; kernels are compiled for each power of 2 of columns
FEW = 64  # tensors with so many times fewer numbers than others take their tiles, to go with them
NOBODY = 2**62  # a program that no tensor has
DTYPES = {getattr(torch, n): getattr(tl, n) for n in ("float16", "bfloat16", "float32", "float64")}


class Told(NamedTuple):
    """What the division depends on, of one tensor."""

    shape: tuple[int, ...]  # S
    broadcast: tuple[int, ...]  # B
    dtypes: tuple[torch.dtype, ...]  # of the sources
    base: torch.dtype | None
    other: torch.dtype  # of the merged weight as it is stored, or of its gradient
    written: torch.dtype  # what the merged weight is rounded to before
    is_prepared: bool
    is_aligned: bool  # whether all addresses are


class Kind(NamedTuple):
    """What tensors that go together have in common, beside their tiles."""

    dtypes: tuple[torch.dtype, ...]
    base: torch.dtype | None
    other: torch.dtype
    written: torch.dtype
    is_prepared: bool
    is_side: bool
    is_aligned: bool


@dataclass(frozen=True)
class Group:
    """Tensors of one kind, in the same tiles."""

    kind: Kind
    members: tuple[int, ...]  # which of the tensors
    layouts: tuple[Layout, ...]
    chunks: int  # of the summed axis, one for each program
    programs: int
    division: tuple[int, ...]  # the table's first rows, see `programs`

    @property
    def width(self) -> int:
        """Columns of the table."""
        return _width(len(self.members))

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """How many coefficients each member has, of all sources."""
        return tuple(len(self.kind.dtypes) * layout.coefficients for layout in self.layouts)

    def places(self, begin: int) -> list[int]:
        """Where each member's coefficients for the sources from `begin` on are, among all sums."""
        first = [0, *itertools.accumulate(self.sizes)]
        return [
            place + begin * layout.coefficients
            for place, layout in zip(first, self.layouts, strict=False)
        ]

    @property
    def tile(self) -> tuple[int, int]:
        return self.layouts[0].tile


@functools.cache
def wide(dtype: torch.dtype) -> torch.dtype:
    """In which sums over sources of a dtype are accumulated."""
    return torch.promote_types(torch.float32, dtype)


@functools.lru_cache(REMEMBERED)
def merged_groups(told: tuple[Told, ...]) -> tuple[Group, ...]:
    """Each program makes one tile of a weight."""
    groups = []
    for kind, members, layouts in _alike(told, MERGED):
        rows = [(own.tiles, own.tiles_summed) for own in layouts]
        groups.append(_group(kind, members, layouts, 0, rows))
    return tuple(groups)


@functools.lru_cache(REMEMBERED)
def summed_groups(told: tuple[Told, ...], most: int, fewest: int) -> tuple[Group, ...]:
    """Each program sums up to `most` tiles, but so few that there are `fewest` programs."""
    groups = []
    for kind, members, layouts in _alike(told, SUMMED):
        steps = max(1, min(most, sum(own.tiles for own in layouts) // fewest))
        chunks = max(-(-own.tiles_summed // steps) for own in layouts)
        rows = [
            (chunks * own.stack * own.tiles_kept, -(-own.tiles_summed // chunks)) for own in layouts
        ]
        groups.append(_group(kind, members, layouts, chunks, rows))
    return tuple(groups)


def _group(
    kind: Kind,
    members: Sequence[int],
    layouts: Sequence[Layout],
    chunks: int,
    rows: Sequence[tuple[int, int]],  # programs of each, and tiles, of the tensor or of a program
) -> Group:
    *begins, programs = [0, *itertools.accumulate(count for count, _ in rows)]
    columns = [
        (begin, own.kept, own.summed, own.coefficients, own.tiles_kept, tiles)
        for begin, own, (_, tiles) in zip(begins, layouts, rows, strict=True)
    ]
    columns += [(NOBODY, 0, 0, 0, 0, 0)] * (_width(len(columns)) - len(columns))
    division = tuple(itertools.chain(*zip(*columns, strict=True)))
    return Group(kind, tuple(members), tuple(layouts), chunks, programs, division)


def _width(count: int) -> int:
    return max(FEWEST, power_of_2(count))


def _alike(
    told: Sequence[Told], numbers: int
) -> Iterator[tuple[Kind, Sequence[int], Sequence[Layout]]]:
    """Tensors that go together; empty ones not at all."""
    found = defaultdict(list)
    layouts = [layout_of(own.shape, own.broadcast, numbers) for own in told]
    for number, (own, layout) in enumerate(zip(told, layouts, strict=True)):
        if layout.tiles:
            is_aligned = own.is_aligned and layout.side % ALIGNED == 0
            kind = Kind(
                own.dtypes, own.base, own.other, own.written, own.is_prepared,
                layout.is_side, is_aligned,
            )  # fmt: skip
            found[kind].append(number)
    for kind, members in found.items():
        for tile, own in _by_tile(members, layouts).items():
            for some in (own[n : n + MOST] for n in range(0, len(own), MOST)):
                yield kind, some, [replace(layouts[number], tile=tile) for number in some]


def _by_tile(members: Sequence[int], layouts: Sequence[Layout]) -> dict[tuple[int, int], list[int]]:
    """Where some have next to none of the numbers, they take the tile of the others, so that one
    start less is made. Most of such a tile is padding, which is little beside the others' work."""
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number in members:
        found[layouts[number].tile].append(number)
    sizes = {tile: sum(layouts[n].numbers for n in own) for tile, own in found.items()}
    largest = max(sizes, key=sizes.__getitem__)
    for tile, size in sizes.items():
        if tile != largest and FEW * size <= sizes[largest]:
            found[largest] += found.pop(tile)
    return found
