"""The formula in one pass over the sources, and its gradient in another, for GPUs (Triton).

`formula` says what is computed; this says how without a float32 copy of a weight ever being
written: sums stay in registers. Bytes moved: the sources (and the base) once and the merged weight
once; for the gradient the sources and the weight's gradient once.

Imported only where there is a GPU and Triton, and in tests, by Triton's interpreter.
"""

import functools
import logging
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_dam.inputs import Inputs
from mergekit_dam.kernels.groups import DTYPES, Group, merged_groups, summed_groups, wide
from mergekit_dam.kernels.layout import MERGED, Layout, expanded, layout_of, padded
from mergekit_dam.kernels.programs import combine_kernel, gradient_kernel
from mergekit_dam.kernels.table import Part, part_of, table_of

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
        shape, broadcast = sources[0].shape, c.shape[1:]
        out = torch.empty(shape, dtype=other, device=sources[0].device)
        factors = expanded(c, layout_of(shape, broadcast, MERGED), shape)
        factors = factors.to(wide(sources[0].dtype)).contiguous()
        parts.append(
            part_of(out, factors, own.base, sources, broadcast, dtype, is_prepared=is_prepared)
        )
        merged.append(out)
    for group in merged_groups(tuple([part.told for part in parts])):
        results = [merged[number].data_ptr() for number in group.members]
        table = table_of(group, [parts[number] for number in group.members], results)
        with torch.cuda.device_of(table):
            combine_kernel[(group.programs,)](
                table, DTYPES=group.dtypes(), WRITTEN=DTYPES[group.kind.written],
                IS_PREPARED=group.kind.is_prepared, **group.options, **OPTIONS,
            )  # fmt: skip
    return merged


def gradient(
    outers: Sequence[Tensor],  # of each tensor S, dL/dW
    inputs: Sequence[Inputs],
    shapes: Sequence[Sequence[int]],  # [N, *B]
) -> list[Tensor]:  # [N, *B], float32, or float64 for float64 sources
    """dL/dc_i = Σ over the broadcast axes of dL/dW * D_i; the same bits for the same tensors
    together."""
    parts, found = [], {}
    for outer, own, shape in zip(outers, inputs, shapes, strict=True):
        sources, subtracted = own.parts
        parts.append(part_of(None, outer.contiguous(), subtracted, sources, shape[1:], outer.dtype))
    for group in summed_groups(tuple([part.told for part in parts]), STEPS, PROGRAMS):
        sums = _sums(group, [parts[number] for number in group.members])
        for number, layout, own in zip(group.members, group.layouts, sums, strict=True):
            found[number] = _reduced(own, layout, outers[number].shape, shapes[number])
    empty = (number for number in range(len(parts)) if number not in found)
    for number in empty:
        found[number] = torch.zeros(
            tuple(shapes[number]), dtype=wide(parts[number].sources[0].dtype),
            device=outers[number].device,
        )  # fmt: skip
    return [found[number] for number in range(len(parts))]


def _sums(group: Group, parts: Sequence[Part]) -> Sequence[Tensor]:
    """Of each member [N * stack * kept]: each program's own, which are then added up."""
    *places, end = group.places
    partial = torch.empty(
        (group.chunks, end), dtype=wide(group.kind.dtypes[0]), device=parts[0].factor.device
    )
    for begin in range(0, len(group.kind.dtypes), TOGETHER):
        chosen = slice(begin, begin + TOGETHER)
        results = [
            place + begin * layout.coefficients
            for place, layout in zip(places, group.layouts, strict=True)
        ]
        table = table_of(group, parts, results, chosen)
        with torch.cuda.device_of(table):
            gradient_kernel[(group.programs,)](
                table, partial, group.chunks, end, DTYPES=group.dtypes(chosen), **group.options,
                **OPTIONS,
            )  # fmt: skip
    total = partial.sum(0) if group.chunks > 1 else partial[0]
    return total.split(group.sizes)


def _reduced(
    sums: Tensor, layout: Layout, shape: Sequence[int], coefficients: Sequence[int]
) -> Tensor:
    """[N, *B] of sums for each of an expanded tensor's numbers, or of those that B has."""
    if layout.is_expanded:
        sums = sums.view(-1, *shape)
        sums = sums.sum_to_size((len(sums), *padded(coefficients[1:], shape)))
    return sums.reshape(coefficients)


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
