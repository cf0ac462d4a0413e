"""Tensors that go together, and the table that tells a kernel of them."""

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from mergekit_dam.kernels.layout import Layout, power_of_2

ALIGNED = 16  # bytes of an address, and numbers of the axis side by side, for the widest loads
FEWEST, MOST = 8, 256  # tensors in a table; kernels are compiled for each power of 2 of columns
NOBODY = 2**62  # a program that no tensor has
DTYPES = {getattr(torch, n): getattr(tl, n) for n in ("float16", "bfloat16", "float32", "float64")}


def wide(sources: Sequence[Tensor]) -> torch.dtype:
    """In which sums are accumulated."""
    return torch.promote_types(torch.float32, sources[0].dtype)


@dataclass(frozen=True)
class Kind:
    """What tensors that go together have in common."""

    dtypes: tuple[torch.dtype, ...]  # of the sources
    base: torch.dtype | None
    other: torch.dtype  # of the merged weight as it is stored, or of its gradient
    written: torch.dtype  # what the merged weight is rounded to before
    wide: torch.dtype
    is_prepared: bool
    tile: tuple[int, int]
    is_side: bool
    is_aligned: bool

    @functools.cached_property
    def options(self) -> dict:
        return {
            "OTHER": DTYPES[self.other], "WIDE": DTYPES[self.wide],
            "BASE_DTYPE": None if self.base is None else DTYPES[self.base],
            "TILE_SUMMED": self.tile[0], "TILE_KEPT": self.tile[1],
            "IS_SIDE": self.is_side, "IS_ALIGNED": self.is_aligned,
        }  # fmt: skip

    def sources(self, chosen: slice = slice(None)) -> tuple:
        """The dtypes of some of the sources."""
        return tuple(DTYPES[dtype] for dtype in self.dtypes[chosen])


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
    base: Tensor | None,
    sources: Sequence[Tensor],
    written: torch.dtype,
    *,
    is_prepared: bool = False,
) -> Part:
    sources = tuple(source.contiguous() for source in sources)
    base = None if base is None else base.contiguous()
    placed = [t for t in (*sources, factor, result, base) if t is not None]
    is_aligned = layout.side % ALIGNED == 0 and not any(t.data_ptr() % ALIGNED for t in placed)
    kind = Kind(
        tuple(source.dtype for source in sources), None if base is None else base.dtype,
        (factor if result is None else result).dtype, written, wide(sources), is_prepared,
        layout.tile, layout.is_side, is_aligned,
    )  # fmt: skip
    return Part(kind, layout, result, factor, base, sources)


def alike(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Parts that go together; empty ones not at all."""
    found = defaultdict(list)
    for part in parts:
        if part.layout.tiles:
            found[part.kind].append(part)
    for together in found.values():
        yield from (together[n : n + MOST] for n in range(0, len(together), MOST))


def table_of(
    parts: Sequence[Part],
    programs: Sequence[int],  # of each part
    tiles: Sequence[int],
    results: Sequence[int],
    sources: slice = slice(None),
) -> Tensor:
    """[9 + n, a power of 2], see `programs`."""
    told, begin = [], 0
    for part, count, steps, result in zip(parts, programs, tiles, results, strict=True):
        layout, base = part.layout, 0 if part.base is None else part.base.data_ptr()
        told.append([
            begin, layout.kept, layout.summed, layout.coefficients, layout.tiles_kept, steps,
            result, part.factor.data_ptr(), base, *(s.data_ptr() for s in part.sources[sources]),
        ])  # fmt: skip
        begin += count
    nobody = [NOBODY] + [0] * (len(told[0]) - 1)
    told += [nobody] * (max(FEWEST, power_of_2(len(told))) - len(told))
    # From pageable memory so small a copy is staged at once, and nobody waits for the GPU.
    table = torch.tensor(list(zip(*told, strict=True)), dtype=torch.int64, device="cpu")
    return table.to(parts[0].factor.device, non_blocking=True)
