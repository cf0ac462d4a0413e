"""Tensors that go together, and the table that tells a kernel of them."""

import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from mergekit_dam.kernels.layout import Layout, power_of_2

ALIGNED = 16  # bytes of an address, and numbers of the axis side by side, for the widest loads
FEWEST = 8  # rows of a table: kernels are compiled for each number of them
NOBODY = 2**62  # a program that no tensor has
DTYPES = {getattr(torch, n): getattr(tl, n) for n in ("float16", "bfloat16", "float32", "float64")}


def wide(sources: Sequence[Tensor]) -> torch.dtype:
    """In which sums are accumulated."""
    return torch.promote_types(torch.float32, sources[0].dtype)


@dataclass(frozen=True)
class Kind:
    """What tensors that go together have in common."""

    count: int  # of sources
    source: torch.dtype  # of sources and base
    other: torch.dtype  # of the merged weight, or of its gradient
    wide: torch.dtype
    has_base: bool
    is_prepared: bool
    tile: tuple[int, int]
    is_side: bool
    is_aligned: bool

    @functools.cached_property
    def options(self) -> dict:
        return {
            "SOURCE": DTYPES[self.source], "OTHER": DTYPES[self.other], "WIDE": DTYPES[self.wide],
            "HAS_BASE": self.has_base, "TILE_SUMMED": self.tile[0], "TILE_KEPT": self.tile[1],
            "IS_SIDE": self.is_side, "IS_ALIGNED": self.is_aligned,
        }  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One tensor among those that go together."""

    kind: Kind
    layout: Layout
    result: Tensor | None  # the merged weight
    factor: Tensor  # coefficients, or the weight's gradient
    base: Tensor | None
    sources: tuple[Tensor, ...]


def part_of(
    layout: Layout,
    result: Tensor | None,
    factor: Tensor,
    other: torch.dtype,
    base: Tensor | None,
    sources: Sequence[Tensor],
    *,
    is_prepared: bool = False,
) -> Part:
    given = [*sources, *([] if base is None else [base])]
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in given))
    given = [tensor.to(dtype).contiguous() for tensor in given]
    placed = [*given, factor, *([] if result is None else [result])]
    is_aligned = layout.side % ALIGNED == 0 and not any(t.data_ptr() % ALIGNED for t in placed)
    kind = Kind(
        len(sources), dtype, other, wide(sources), base is not None, is_prepared,
        layout.tile, layout.is_side, is_aligned,
    )  # fmt: skip
    own = tuple(given[: len(sources)])
    return Part(kind, layout, result, factor, None if base is None else given[-1], own)


def alike(parts: Sequence[Part]) -> Iterable[tuple[Kind, list[Part]]]:
    """Parts that go together; empty ones not at all."""
    found = defaultdict(list)
    for part in parts:
        if part.layout.tiles:
            found[part.kind].append(part)
    return found.items()


def table_of(parts: Sequence[Part], programs: Sequence[int], rows: Sequence[tuple]) -> Tensor:
    """[a power of 2, 9 + N]; `rows`: tiles, the first address, and sources of each part."""
    told, begin = [], 0
    for part, count, (tiles, first, sources) in zip(parts, programs, rows, strict=True):
        layout, base = part.layout, 0 if part.base is None else part.base.data_ptr()
        told.append([
            begin, layout.kept, layout.summed, layout.coefficients, layout.tiles_kept, tiles,
            first, part.factor.data_ptr(), base, *(source.data_ptr() for source in sources),
        ])  # fmt: skip
        begin += count
    nobody = [NOBODY] + [0] * (len(told[0]) - 1)
    told += [nobody] * (max(FEWEST, power_of_2(len(told))) - len(told))
    # From pageable memory such a copy is staged at once, and nobody waits for the GPU.
    table = torch.tensor(told, dtype=torch.int64, device="cpu")
    return table.to(parts[0].factor.device, non_blocking=True)
