"""The formula in one pass over the sources, and its gradient in another, for GPUs (Triton).

`formula` says what is computed; this says how without a float32 copy of a weight ever being
written: sums stay in registers. Bytes moved: the sources (and the base) once and the merged weight
once; for the gradient the sources and the weight's gradient once.

Imported only where there is a GPU and Triton, and in tests, by Triton's interpreter.
"""

import functools
import itertools
import logging
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mergekit_dam.inputs import Inputs
from mergekit_dam.kernels.layout import MERGED, SUMMED, expanded, layout_of, padded
from mergekit_dam.kernels.programs import combine_kernel, gradient_kernel
from mergekit_dam.kernels.table import DTYPES, Part, alike, part_of, table_of, wide

STEPS = 32  # tiles that a program of the gradient sums up, at most,
PROGRAMS = 1024  # but so few that there are as many programs, to fill a GPU
TOGETHER = 4  # sources whose sums fit into registers
OPTIONS = {"enable_fp_fusion": False}  # products are rounded before they are added, as on a CPU
LOG = logging.getLogger(__name__)


def combine(
    coefficients: Sequence[Tensor],  # of each tensor [N, *B]
    inputs: Sequence[Inputs],
    dtypes: Sequence[torch.dtype],  # what each is rounded to
    stored: Sequence[torch.dtype],  # in which it is given
) -> list[Tensor]:
    """As `formula.combine_all` does, to the rounding of sums in another order."""
    merged, parts = [], []
    for c, own, dtype, other in zip(coefficients, inputs, dtypes, stored, strict=True):
        sources, is_prepared = own.parts[0], own.prepared is not None
        out = torch.empty(sources[0].shape, dtype=other, device=sources[0].device)
        layout = layout_of(tuple(out.shape), tuple(c.shape[1:]), MERGED)
        factors = expanded(c, layout, out.shape).to(wide(sources)).contiguous()
        part = part_of(layout, out, factors, own.base, sources, dtype, is_prepared=is_prepared)
        parts.append(part)
        merged.append(out)
    for together in alike(parts):
        kind, programs = together[0].kind, [part.layout.tiles for part in together]
        tiles = [part.layout.tiles_summed for part in together]
        table = table_of(together, programs, tiles, [p.result.data_ptr() for p in together])
        with torch.cuda.device_of(table):
            combine_kernel[(sum(programs),)](
                table, WIDTH=table.shape[1], DTYPES=kind.sources(), WRITTEN=DTYPES[kind.written],
                IS_PREPARED=kind.is_prepared, **kind.options, **OPTIONS,
            )  # fmt: skip
    return merged


def gradient(
    outers: Sequence[Tensor],  # of each tensor S, dL/dW
    inputs: Sequence[Inputs],
    shapes: Sequence[Sequence[int]],  # [N, *B]
) -> list[Tensor]:  # [N, *B], float32, or float64 for float64 sources
    """dL/dc_i = Σ over the broadcast axes of dL/dW * D_i; the same bits for the same tensors
    together."""
    parts = []
    for outer, own, shape in zip(outers, inputs, shapes, strict=True):
        sources, subtracted = own.parts
        layout = layout_of(tuple(outer.shape), tuple(shape[1:]), SUMMED)
        parts.append(part_of(layout, None, outer.contiguous(), subtracted, sources, outer.dtype))
    sums = {id(part): own for together in alike(parts) for part, own in _sums(together)}
    return [
        _reduced(sums.get(id(part)), part, outer, shape)
        for part, outer, shape in zip(parts, outers, shapes, strict=True)
    ]


def _sums(parts: Sequence[Part]) -> Iterator[tuple[Part, Tensor]]:
    """Of parts of one kind [N, stack * kept]: each program's own, which are then added up."""
    kind, count = parts[0].kind, len(parts[0].sources)
    steps = max(1, min(STEPS, sum(part.layout.tiles for part in parts) // PROGRAMS))
    chunks = max(-(-part.layout.tiles_summed // steps) for part in parts)
    programs = [chunks * part.layout.stack * part.layout.tiles_kept for part in parts]
    tiles = [-(-part.layout.tiles_summed // chunks) for part in parts]
    sizes = [count * part.layout.coefficients for part in parts]
    places = [0, *itertools.accumulate(sizes)]
    partial = torch.empty((chunks, places[-1]), dtype=kind.wide, device=parts[0].factor.device)
    for begin in range(0, count, TOGETHER):
        chosen = slice(begin, begin + TOGETHER)
        results = [
            place + begin * part.layout.coefficients
            for part, place in zip(parts, places, strict=False)
        ]
        table = table_of(parts, programs, tiles, results, chosen)
        with torch.cuda.device_of(table):
            gradient_kernel[(sum(programs),)](
                table, partial, chunks, places[-1], WIDTH=table.shape[1],
                DTYPES=kind.sources(chosen), **kind.options, **OPTIONS,
            )  # fmt: skip
    total = partial.sum(0) if chunks > 1 else partial[0]
    for part, own in zip(parts, total.split(sizes), strict=True):
        yield part, own.view(count, -1)


def _reduced(sums: Tensor | None, part: Part, outer: Tensor, shape: Sequence[int]) -> Tensor:
    """[N, *B] of sums for each of an expanded tensor's numbers, or of those that B has."""
    if sums is None:  # of an empty tensor
        return torch.zeros(tuple(shape), dtype=part.kind.wide, device=outer.device)
    if part.layout.is_expanded:
        sums = sums.reshape(len(sums), *outer.shape)
        sums = sums.sum_to_size((len(sums), *padded(shape[1:], outer.shape)))
    return sums.reshape(tuple(shape))


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
        right = all(_are_right(device, dtype) for dtype in (torch.float32, torch.bfloat16))
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


def _are_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Tried with what is written and a base of a dtype, and sources of that and of float32."""
    generator = torch.Generator().manual_seed(0)
    # On the CPU whatever the default device is: mergekit sets one for each of several GPUs.
    numbers = torch.randn((5, 70, 320), generator=generator, device="cpu").to(device, dtype)
    base, outer, first, *others = numbers
    own = Inputs((first.float(), *others), base, None)
    each = [
        torch.randn((3, *broadcast), generator=generator, device="cpu").to(device)
        for broadcast in ((1, 320), (70, 1), (1, 320))
    ]
    merged = combine(each, [own] * 3, [dtype] * 3, [torch.float32] * 3)
    by_c = gradient([outer] * 3, [own] * 3, [c.shape for c in each])
    numbers, step = numbers.double(), torch.finfo(dtype).eps
    differences = numbers[2:] - numbers[0]
    return all(
        torch.equal(weight, weight.to(dtype).float())
        and torch.allclose(weight.double(), numbers[0] + (c * differences).sum(0), step, 1e-4)
        and torch.allclose(
            slope.double(), (numbers[1] * differences).sum_to_size(c.shape), atol=1e-3
        )
        for c, weight, slope in zip(each, merged, by_c, strict=True)
    )
