"""The formula in one pass over the sources, and its gradient in another, for GPUs (Triton).

`formula` says what is computed; this says how without a float32 copy of a weight ever being
written: sums stay in registers. Bytes moved: the sources (and the base) once and the merged weight
once; for the gradient the sources and the weight's gradient once.

Imported only where there is a GPU and Triton, and in tests, by Triton's interpreter.
"""

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # numbers that a program works on at once: eight a thread, one load of 16-bit numbers
CONTIGUOUS = 256  # of them, along the axis whose numbers lie side by side
STEPS = 16  # tiles that a program of the gradient sums up
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
    """One chunk of the summed axis, for every source in turn: after the first, the chunk of the
    outer gradient comes out of the cache."""
    program = tl.program_id(0).to(tl.int64)
    chunk = program % chunks
    program = program // chunks
    k = program % tiles_kept * TILE_KEPT + tl.arange(0, TILE_KEPT)
    e = program // tiles_kept
    for i in tl.static_range(COUNT):
        total = tl.zeros([TILE_SUMMED, TILE_KEPT], WIDE)
        for tile in range(TILES):
            m = (chunk * TILES + tile) * TILE_SUMMED + tl.arange(0, TILE_SUMMED)
            at = e * stack_stride + m[:, None] * summed_stride + k[None, :] * kept_stride
            inside = (m < summed)[:, None] & (k < kept)[None, :]
            part = tl.load(sources[i] + at, inside, 0.0).to(WIDE)
            if base is not None:
                part -= tl.load(base + at, inside, 0.0).to(WIDE)
            total += part * tl.load(outer + at, inside, 0.0).to(WIDE)
        place = ((chunk * COUNT + i) * stack + e) * kept + k
        tl.store(partial + place, tl.sum(total, 0), k < kept)


def combine(
    coefficients: Tensor,  # [N, *B]
    sources: Sequence[Tensor],  # N tensors of shape S
    base: Tensor | None,  # S
    dtype: torch.dtype,
    *,
    prepared: bool,
) -> Tensor:  # S
    """As `formula.combine` does, to the rounding of sums in another order."""
    shape, layout = (
        tuple(sources[0].shape),
        _layout(tuple(sources[0].shape), tuple(coefficients.shape[1:])),
    )
    wide = torch.promote_types(torch.float32, sources[0].dtype)
    merged = torch.empty(shape, dtype=dtype, device=sources[0].device)
    with torch.cuda.device_of(merged):
        _combine_kernel[(layout.stack * layout.tiles_kept * layout.tiles_summed,)](
            merged,
            _coefficients(coefficients, layout, shape),
            tuple(source.contiguous() for source in sources),
            None if base is None else base.contiguous(),
            layout.stack, layout.kept, layout.summed, layout.tiles_kept, layout.tiles_summed,
            *layout.strides,
            COUNT=len(sources), PREPARED=prepared, WIDE=_WIDE[wide],
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
    layout = _layout(tuple(outer.shape), tuple(shape[1:]))
    steps = min(STEPS, layout.tiles_summed)
    chunks = -(-layout.tiles_summed // steps)
    wide = torch.promote_types(torch.float32, sources[0].dtype)
    partial = torch.empty(
        (chunks, len(sources), layout.stack * layout.kept), dtype=wide, device=outer.device
    )
    with torch.cuda.device_of(outer):
        _gradient_kernel[(layout.stack * layout.tiles_kept * chunks,)](
            partial,
            outer.contiguous(),
            tuple(source.contiguous() for source in sources),
            None if subtracted is None else subtracted.contiguous(),
            layout.stack, layout.kept, layout.summed, layout.tiles_kept, chunks,
            *layout.strides,
            COUNT=len(sources), WIDE=_WIDE[wide],
            TILE_SUMMED=layout.tile[0], TILE_KEPT=layout.tile[1], TILES=steps, **OPTIONS,
        )  # fmt: skip
    total = partial.sum(0)
    if layout.is_expanded:
        total = total.reshape(len(sources), *outer.shape)
        total = total.sum_to_size((len(sources), *_padded(shape[1:], outer.shape)))
    return total.reshape(tuple(shape))


_WIDE = {torch.float32: tl.float32, torch.float64: tl.float64}


@dataclass(frozen=True)
class _Layout:
    """A tensor as [stack, kept, summed]: its coefficients differ along the first two."""

    stack: int
    kept: int
    summed: int
    strides: tuple[int, int, int]
    is_expanded: bool = False  # to a coefficient for each number

    @property
    def tile(self) -> tuple[int, int]:  # summed, kept
        if self.strides[1] == 1 and self.kept > 1:
            kept = min(CONTIGUOUS if self.summed > 1 else TILE, _power_of_2(self.kept))
            return min(TILE // kept, _power_of_2(self.summed)), kept
        summed = min(CONTIGUOUS if self.kept > 1 else TILE, _power_of_2(self.summed))
        return summed, min(TILE // summed, _power_of_2(self.kept))

    @property
    def tiles_kept(self) -> int:
        return -(-self.kept // self.tile[1])

    @property
    def tiles_summed(self) -> int:
        return -(-self.summed // self.tile[0])


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


@functools.cache
def _layout(shape: tuple[int, ...], broadcast: tuple[int, ...]) -> _Layout:
    """Of a contiguous tensor of a shape S, with coefficients [*B]."""
    count = math.prod(shape)
    broadcast = _padded(broadcast, shape)
    if all(size == 1 for size in broadcast):
        return _Layout(1, 1, count, (0, 0, 1))
    if len(shape) > 1 and broadcast[:-2] == tuple(shape[:-2]):
        rows, columns = shape[-2:]
        stack = math.prod(shape[:-2])
        if broadcast[-2:] == (1, columns):
            return _Layout(stack, columns, rows, (rows * columns, 1, columns))
        if broadcast[-2:] == (rows, 1):
            return _Layout(stack, rows, columns, (rows * columns, columns, 1))
    return _Layout(1, count, 1, (0, 1, 0), is_expanded=True)


def _padded(broadcast: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    return (1,) * (len(shape) - len(broadcast)) + tuple(broadcast)


def _coefficients(coefficients: Tensor, layout: _Layout, shape: Sequence[int]) -> Tensor:
    if layout.is_expanded:
        padded = _padded(coefficients.shape[1:], shape)
        coefficients = coefficients.reshape(-1, *padded).expand(-1, *shape)
    return coefficients.contiguous()


@functools.cache
@torch.no_grad()
def works(device: torch.device) -> bool:
    """Whether the kernels compile there and compute what they should, once for a process. Where
    they do not (a machine without a C compiler, say), says so, and plain torch serves."""
    try:
        right = all(_is_right(device, dtype) for dtype in (torch.float32, torch.bfloat16))
        reason = "they compute something else than plain torch"
    except Exception as error:  # whatever a compiler or driver may raise
        right, reason = False, (str(error).strip() or type(error).__name__).splitlines()[0]
    if not right:
        LOG.warning("Merged weights are made without kernels of their own (%s): slower.", reason)
    return right


def _is_right(device: torch.device, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn((4, 70, 300), generator=generator).to(device, dtype)
    outer, *sources = numbers
    coefficients = torch.randn((3, 1, 300), generator=generator).to(device)
    merged = combine(coefficients, sources, outer, torch.float32, prepared=False)
    by_c = gradient(outer, sources, None, coefficients.shape)
    numbers = numbers.double()
    expected = numbers[0] + (coefficients * (numbers[1:] - numbers[0])).sum(0)
    by_c_expected = (numbers[0] * numbers[1:]).sum(1, keepdim=True)
    return torch.allclose(merged.double(), expected, atol=1e-4) and torch.allclose(
        by_c.double(), by_c_expected, atol=1e-3
    )
