"""The formula in one pass over the sources, and its gradient in another, for GPUs (Triton).

`formula` says what is computed; this says how without a float32 copy of a weight ever being
written: sums stay in registers. Bytes moved: the sources (and the base) once and the merged weight
once; for the gradient the sources and the weight's gradient once.

Imported only where there is a GPU and Triton, and in tests, by Triton's interpreter.
"""

import functools
import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers that a program works on at once, of a merged weight and of a sum for each source; along
# the axis whose numbers lie side by side, so many of them. Of ten choices 1,024 side by side were
# the fastest on an H200; they spill registers on other GPUs, 512 do not.
MERGED, SUMMED, SIDE = 2048, 2048, 512
STEPS = 32  # tiles that a program of the gradient sums up, at most,
PROGRAMS = 1024  # but so few that there are as many programs, to fill a GPU
TOGETHER = 4  # sources whose sums fit into registers
OPTIONS = {"enable_fp_fusion": False}  # products are rounded before they are added, as on a CPU
LOG = logging.getLogger(__name__)


@triton.jit
def _combine_kernel(
    merged, coefficients, sources, base, stack, kept, summed, tiles_kept, tiles_summed,
    stack_stride, kept_stride, summed_stride,
    COUNT: tl.constexpr, PREPARED: tl.constexpr, WIDE: tl.constexpr,
    TILE_SUMMED: tl.constexpr, TILE_KEPT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    m = program % tiles_summed * TILE_SUMMED + tl.arange(0, TILE_SUMMED)
    program = program // tiles_summed
    k = program % tiles_kept * TILE_KEPT + tl.arange(0, TILE_KEPT)
    e = program // tiles_kept
    at = e * stack_stride + m[:, None] * summed_stride + k[None, :] * kept_stride
    inside = (m < summed)[:, None] & (k < kept)[None, :]
    total = tl.zeros([TILE_SUMMED, TILE_KEPT], WIDE)
    if base is not None:
        origin = tl.load(base + at, inside, 0.0).to(WIDE)
    for i in tl.static_range(COUNT):
        factor = tl.load(coefficients + (i * stack + e) * kept + k, k < kept, 0.0).to(WIDE)
        part = tl.load(sources[i] + at, inside, 0.0).to(WIDE)
        if base is not None and not PREPARED:
            part -= origin
        total += part * factor[None, :]
    if base is not None:
        total += origin
    if merged.dtype.element_ty != tl.float64:  # in two roundings, as torch does
        total = total.to(tl.float32)
    tl.store(merged + at, total.to(merged.dtype.element_ty), inside)


@triton.jit
def _gradient_kernel(
    partial, outer, sources, base, stack, kept, summed, tiles_kept, chunks,
    stack_stride, kept_stride, summed_stride,
    COUNT: tl.constexpr, WIDE: tl.constexpr,
    TILE_SUMMED: tl.constexpr, TILE_KEPT: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One chunk of the summed axis, tile by tile, a sum for each source in registers."""
    program = tl.program_id(0).to(tl.int64)
    chunk = program % chunks
    program = program // chunks
    k = program % tiles_kept * TILE_KEPT + tl.arange(0, TILE_KEPT)
    e = program // tiles_kept
    totals = ()
    for _ in tl.static_range(COUNT):
        totals = totals + (tl.zeros([TILE_SUMMED, TILE_KEPT], WIDE),)  # noqa: RUF005  for Triton
    for tile in range(TILES):
        m = (chunk * TILES + tile) * TILE_SUMMED + tl.arange(0, TILE_SUMMED)
        at = e * stack_stride + m[:, None] * summed_stride + k[None, :] * kept_stride
        inside = (m < summed)[:, None] & (k < kept)[None, :]
        slope = tl.load(outer + at, inside, 0.0).to(WIDE)
        if base is not None:
            origin = tl.load(base + at, inside, 0.0).to(WIDE)
        grown = ()
        for i in tl.static_range(COUNT):
            part = tl.load(sources[i] + at, inside, 0.0).to(WIDE)
            if base is not None:
                part -= origin
            grown = grown + (totals[i] + part * slope,)  # noqa: RUF005
        totals = grown
    for i in tl.static_range(COUNT):
        place = ((chunk * COUNT + i) * stack + e) * kept + k
        tl.store(partial + place, tl.sum(totals[i], 0), k < kept)


def combine(
    coefficients: Tensor,  # [N, *B]
    sources: Sequence[Tensor],  # N tensors of shape S
    base: Tensor | None,  # S
    dtype: torch.dtype,
    *,
    prepared: bool,
) -> Tensor:  # S
    """As `formula.combine` does, to the rounding of sums in another order."""
    shape = tuple(sources[0].shape)
    layout = _layout(shape, tuple(coefficients.shape[1:]), MERGED)
    merged = torch.empty(shape, dtype=dtype, device=sources[0].device)
    if not merged.numel():
        return merged
    with torch.cuda.device_of(merged):
        _combine_kernel[(layout.stack * layout.tiles_kept * layout.tiles_summed,)](
            merged,
            _coefficients(coefficients, layout, shape),
            tuple(source.contiguous() for source in sources),
            None if base is None else base.contiguous(),
            layout.stack, layout.kept, layout.summed, layout.tiles_kept, layout.tiles_summed,
            *layout.strides,
            COUNT=len(sources), PREPARED=prepared, WIDE=_WIDE[_wide(sources)],
            TILE_SUMMED=layout.tile[0], TILE_KEPT=layout.tile[1], **OPTIONS,
        )  # fmt: skip
    return merged


def gradient(
    outer: Tensor,  # S, dL/dW
    sources: Sequence[Tensor],  # N tensors of shape S
    subtracted: Tensor | None,  # S
    shape: Sequence[int],  # [N, *B]
) -> Tensor:  # [N, *B], float32, or float64 for float64 sources
    """dL/dc_i = Σ over the broadcast axes of dL/dW * D_i; the same at each call."""
    if not outer.numel():
        return torch.zeros(tuple(shape), dtype=_wide(sources), device=outer.device)
    layout = _layout(tuple(outer.shape), tuple(shape[1:]), SUMMED)
    groups = [sources[start : start + TOGETHER] for start in range(0, len(sources), TOGETHER)]
    sums = [_sums(outer.contiguous(), group, subtracted, layout) for group in groups]
    total = torch.cat(sums) if len(sums) > 1 else sums[0]
    if layout.is_expanded:
        total = total.reshape(len(sources), *outer.shape)
        total = total.sum_to_size((len(sources), *_padded(shape[1:], outer.shape)))
    return total.reshape(tuple(shape))


def _sums(
    outer: Tensor, sources: Sequence[Tensor], subtracted: Tensor | None, layout: "_Layout"
) -> Tensor:  # [n, stack * kept]
    """Of a few sources: each program's own, which are then added up."""
    programs = layout.stack * layout.tiles_kept * layout.tiles_summed // PROGRAMS
    steps = max(1, min(STEPS, layout.tiles_summed, programs))
    chunks = -(-layout.tiles_summed // steps)
    size = (chunks, len(sources), layout.stack * layout.kept)
    partial = torch.empty(size, dtype=_wide(sources), device=outer.device)
    with torch.cuda.device_of(outer):
        _gradient_kernel[(layout.stack * layout.tiles_kept * chunks,)](
            partial,
            outer,
            tuple(source.contiguous() for source in sources),
            None if subtracted is None else subtracted.contiguous(),
            layout.stack, layout.kept, layout.summed, layout.tiles_kept, chunks,
            *layout.strides,
            COUNT=len(sources), WIDE=_WIDE[_wide(sources)],
            TILE_SUMMED=layout.tile[0], TILE_KEPT=layout.tile[1], TILES=steps, **OPTIONS,
        )  # fmt: skip
    return partial.sum(0) if chunks > 1 else partial[0]


_WIDE = {torch.float32: tl.float32, torch.float64: tl.float64}


def _wide(sources: Sequence[Tensor]) -> torch.dtype:
    return torch.promote_types(torch.float32, sources[0].dtype)


@dataclass(frozen=True)
class _Layout:
    """A tensor as [stack, kept, summed]: its coefficients differ along the first two."""

    stack: int
    kept: int
    summed: int
    strides: tuple[int, int, int]
    numbers: int  # in a tile
    is_expanded: bool = False  # to a coefficient for each number

    @functools.cached_property
    def tile(self) -> tuple[int, int]:  # summed, kept
        if self.strides[1] == 1 and self.kept > 1:
            kept = min(SIDE if self.summed > 1 else self.numbers, _power_of_2(self.kept))
            return min(self.numbers // kept, _power_of_2(self.summed)), kept
        summed = min(SIDE if self.kept > 1 else self.numbers, _power_of_2(self.summed))
        return summed, min(self.numbers // summed, _power_of_2(self.kept))

    @functools.cached_property
    def tiles_kept(self) -> int:
        return -(-self.kept // self.tile[1])

    @functools.cached_property
    def tiles_summed(self) -> int:
        return -(-self.summed // self.tile[0])


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


@functools.cache
def _layout(shape: tuple[int, ...], broadcast: tuple[int, ...], numbers: int) -> _Layout:
    """Of a contiguous tensor of a shape S, with coefficients [*B]."""
    count = math.prod(shape)
    broadcast = _padded(broadcast, shape)
    if all(size == 1 for size in broadcast):
        return _Layout(1, 1, count, (0, 0, 1), numbers)
    if len(shape) > 1 and broadcast[:-2] == tuple(shape[:-2]):
        rows, columns = shape[-2:]
        stack = math.prod(shape[:-2])
        if broadcast[-2:] == (1, columns):
            return _Layout(stack, columns, rows, (rows * columns, 1, columns), numbers)
        if broadcast[-2:] == (rows, 1):
            return _Layout(stack, rows, columns, (rows * columns, columns, 1), numbers)
    return _Layout(1, count, 1, (0, 1, 0), numbers, is_expanded=True)


def _padded(broadcast: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    return (1,) * (len(shape) - len(broadcast)) + tuple(broadcast)


def _coefficients(coefficients: Tensor, layout: _Layout, shape: Sequence[int]) -> Tensor:
    if layout.is_expanded:
        padded = _padded(coefficients.shape[1:], shape)
        coefficients = coefficients.reshape(-1, *padded).expand(-1, *shape)
    return coefficients.contiguous()


def works(device: torch.device) -> bool:
    """Whether the kernels compile there and compute what they should, tried once in a process.
    Where they do not (a machine without a C compiler, say), says so, and plain torch serves."""
    with _TRYING:  # mergekit merges in several threads
        return _works(device)


_TRYING = threading.Lock()


@functools.cache
@torch.no_grad()
def _works(device: torch.device) -> bool:
    try:
        right = all(
            _is_right(device, dtype, broadcast)
            for dtype in (torch.float32, torch.bfloat16)
            for broadcast in ((1, 300), (70, 1))
        )
        reason = "they compute something else than PyTorch"
    except Exception as error:  # whatever a compiler or driver may raise
        right, reason = False, (str(error).strip() or type(error).__name__).splitlines()[0]
    if not right:
        LOG.warning(
            "Triton's kernels for this GPU cannot be used (%s): plain PyTorch makes the merged "
            "weights, slower and with more memory.",
            reason,
        )
    return right


def _is_right(device: torch.device, dtype: torch.dtype, broadcast: tuple[int, ...]) -> bool:
    generator = torch.Generator().manual_seed(0)
    # On the CPU whatever the default device is: mergekit sets one for each of several GPUs.
    numbers = torch.randn((5, 70, 300), generator=generator, device="cpu").to(device, dtype)
    base, outer, *sources = numbers
    coefficients = torch.randn((3, *broadcast), generator=generator, device="cpu").to(device)
    merged = combine(coefficients, sources, base, torch.float32, prepared=False)
    by_c = gradient(outer, sources, base, coefficients.shape)
    numbers = numbers.double()
    differences = numbers[2:] - numbers[0]
    expected = numbers[0] + (coefficients * differences).sum(0)
    by_c_expected = (numbers[1] * differences).sum_to_size(coefficients.shape)
    return torch.allclose(merged.double(), expected, atol=1e-4) and torch.allclose(
        by_c.double(), by_c_expected, atol=1e-3
    )
