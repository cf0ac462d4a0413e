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
from mergekit_dam.kernels.groups import ALIGNED, Group, wide
from mergekit_dam.kernels.launches import Launch, placed
from mergekit_dam.kernels.layout import MERGED, Layout, expanded, layout_of, padded
from mergekit_dam.kernels.programs import combine_kernel, gradient_kernel

STEPS = 32  # tiles that a program of the gradient sums up, at most,
PROGRAMS = 1024  # but so few that there are as many programs, to fill a GPU
OPTIONS = {"enable_fp_fusion": False}  # products are rounded before they are added, as on a CPU
LOG = logging.getLogger(__name__)


def combine(
    coefficients: Sequence[Tensor],  # of each tensor [N, *B]
    inputs: Sequence[Inputs],
    dtypes: Sequence[torch.dtype],  # what each is rounded to
    stored: Sequence[torch.dtype],  # in which it is given
) -> list[Tensor]:
    """As `formula.combine_all` does, to the rounding of sums in another order."""
    own = placed(inputs, is_sum=False)
    merged = [
        torch.empty(shape, dtype=dtype, device=own.device)
        for shape, dtype in zip(own.shapes, stored, strict=True)
    ]
    factors = [_factors(*each) for each in zip(coefficients, own.sources, strict=True)]
    results, places = _addresses(merged), _addresses(factors)
    with torch.cuda.device_of(merged[0]):
        for launch in own.merging(
            [c.shape for c in coefficients], stored, dtypes,
            is_aligned=_are_aligned(results + places),
        ):  # fmt: skip
            group = launch.group
            table = launch.table(
                [results[n] for n in group.members], [places[n] for n in group.members], own.device
            )
            combine_kernel[(group.programs,)](table, **launch.constants, **OPTIONS)
    return merged


def _factors(coefficients: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """Coefficients as the kernel reads them."""
    shape = sources[0].shape
    factors = expanded(coefficients, layout_of(shape, coefficients.shape[1:], MERGED), shape)
    return factors.to(wide(sources[0].dtype)).contiguous()


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _are_aligned(addresses: Sequence[int]) -> bool:
    return not any([address % ALIGNED for address in addresses])


def gradient(
    outers: Sequence[Tensor],  # of each tensor S, dL/dW
    inputs: Sequence[Inputs],
    shapes: Sequence[torch.Size],  # [N, *B]
) -> list[Tensor]:  # [N, *B], float32, or float64 for float64 sources
    """dL/dc_i = Σ over the broadcast axes of dL/dW * D_i; the same bits for the same tensors
    together."""
    own, outers = placed(inputs, is_sum=True), [outer.contiguous() for outer in outers]
    places, others = _addresses(outers), [outer.dtype for outer in outers]
    found: dict[int, Tensor] = {}
    with torch.cuda.device_of(outers[0]):
        for group, launches in own.summing(
            shapes, others, STEPS, PROGRAMS, is_aligned=_are_aligned(places)
        ):
            sums = _sums(group, launches, [places[n] for n in group.members], own.device)
            for number, layout, some in zip(group.members, group.layouts, sums, strict=True):
                found[number] = _reduced(some, layout, own.shapes[number], shapes[number])
    return [
        found[n] if n in found else _zeros(shape, sources, own.device)
        for n, (shape, sources) in enumerate(zip(shapes, own.sources, strict=True))
    ]


def _sums(
    group: Group, launches: Sequence[Launch], places: Sequence[int], device: torch.device
) -> Sequence[Tensor]:
    """Of each member [N * stack * kept]: each program's own, which are then added up."""
    size, dtype = sum(group.sizes), wide(group.kind.dtypes[0])
    partial = torch.empty((group.chunks, size), dtype=dtype, device=device)
    for launch in launches:
        table = launch.table(launch.places, places, device)
        gradient_kernel[(group.programs,)](
            table, partial, group.chunks, size, **launch.constants, **OPTIONS
        )
    total = partial.sum(0) if group.chunks > 1 else partial[0]
    return total.split(group.sizes)


def _zeros(shape: torch.Size, sources: Sequence[Tensor], device: torch.device) -> Tensor:
    """Of an empty tensor."""
    return torch.zeros(shape, dtype=wide(sources[0].dtype), device=device)


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
