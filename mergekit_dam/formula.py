"""The formula, once: W = base + Σ_i c_i * D_i.

For one output tensor with sources W_1..W_N, each of shape S, and coefficients c of shape
[N, *B] with B broadcastable to S:

- `weights` (DAM, arXiv 2410.08371, section 3): base = 0, D_i = W_i;
- `task_vectors`: base = W_base, D_i = W_i - W_base.

The fit and the merge both compute it here, so the two cannot drift apart.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from mergekit_dam.inputs import Inputs

Formula = Literal["weights", "task_vectors"]
Granularity = Literal["column", "row", "tensor", "element"]
FORMULAS: tuple[str, ...] = get_args(Formula)
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
CACHED = 2**18  # numbers that are worked on at once on a CPU: 1 MB in float32
PASSING = 2**24  # and elsewhere, where no kernel does it


def coefficient_shape(
    shape: Sequence[int],
    granularity: Granularity = "column",
    *,
    input_axis: int = -1,
    bias: bool = False,
) -> tuple[int, ...]:
    """B, the shape of one source's coefficients for a tensor of `shape` S; broadcastable to S.

    `column` (the paper): one coefficient for each input of a layer. A matrix [out, in] has
    B = [1, in]; an embedding [vocab, hidden], one for each hidden dimension; a norm's weight
    is a diagonal matrix, so elementwise; a bias has no input, so one scalar for the source.
    `row`: one for each output; `tensor`: one; `element`: S itself.
    Leading axes (a stack of experts [experts, out, in]) hold matrices of their own.

    `input_axis` is -1 for [out, in], -2 for layers that keep [in, out] (GPT-2's Conv1D).
    """
    if granularity == "tensor" or (bias and granularity == "column"):
        return (1,) * len(shape)
    if granularity == "element" or len(shape) < 2:
        return tuple(shape)
    output_axis = -3 - input_axis  # the other one of the last two axes
    summed = len(shape) + (output_axis if granularity == "column" else input_axis)
    return tuple(1 if axis == summed else size for axis, size in enumerate(shape))


def combine(
    coefficients: Tensor,  # [N, *B] float32
    sources: Sequence[Tensor],  # N tensors of shape S
    base: Tensor | None = None,  # S, for task vectors
    dtype: torch.dtype | None = None,
    *,
    prepared: bool = False,
) -> Tensor:  # S
    """base + Σ_i c_i * (W_i - base), accumulated in float32 (float64 for float64 sources).

    Returned in `dtype`, by default the sources'. Differentiable in `coefficients` alone.
    With `prepared`, `sources` are the D_i themselves: sparsified task vectors.
    """
    inputs = Inputs(tuple(sources), base, tuple(sources) if prepared else None)
    return combine_all([coefficients], [inputs], [dtype or sources[0].dtype])[0]


def combine_all(
    coefficients: Sequence[Tensor],  # of each tensor [N, *B] float32
    inputs: Sequence[Inputs],
    dtypes: Sequence[torch.dtype],
    *,
    stored: torch.dtype | None = None,
    again: Callable[[Sequence[int]], Sequence[Inputs]] | None = None,
) -> tuple[Tensor, ...]:
    """`combine` of several tensors, which a GPU makes in one go.

    With `stored` they are given in that dtype, after they have been rounded to `dtypes`; gradients
    pass through both roundings. `again` gives some of the inputs to the backward pass, by their
    numbers; without it all are kept.
    """
    for own, c in zip(inputs, coefficients, strict=True):
        if len(c) != len(own.sources):
            raise ValueError(f"{len(c)} coefficients for {len(own.sources)} sources")
    again = again or functools.partial(_some, inputs)
    given = [stored or dtype for dtype in dtypes]
    return _Combine.apply(inputs, dtypes, given, again, *coefficients)


def _some(inputs: Sequence[Inputs], numbers: Sequence[int]) -> Sequence[Inputs]:
    return inputs if len(numbers) == len(inputs) else [inputs[number] for number in numbers]


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The same in one pass on a GPU; None where plain torch serves."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    try:
        from mergekit_dam import kernels  # needs Triton
    except ImportError:  # or one that is whole
        return None
    return kernels if kernels.works(device) else None


def _accumulator(sources: Sequence[Tensor]) -> torch.dtype:
    return torch.promote_types(torch.float32, sources[0].dtype)


def _difference(source: Tensor, base: Tensor | None) -> Tensor:  # D_i, S
    if base is None:
        return source
    return source.to(_accumulator([source])) - base


class _Combine(torch.autograd.Function):
    """Keeps references to the sources, or to where they are, and none of the products c_i * D_i,
    whose storage would be N times the weights: the gradient needs the D_i alone."""

    @staticmethod
    def forward(ctx, inputs, dtypes, stored, again, *coefficients):
        ctx.again, ctx.shapes = again, [c.shape for c in coefficients]
        ctx.set_materialize_grads(False)  # of weights that nothing was computed with
        if not inputs:
            return ()
        kernels = _kernels(inputs[0].sources[0].device)
        make = kernels.combine if kernels else _combine
        made = tuple(make(coefficients, inputs, dtypes, stored))
        trained = zip(made, ctx.needs_input_grad[-len(made) :], strict=True)
        ctx.mark_non_differentiable(*(weight for weight, wanted in trained if not wanted))
        return made

    @staticmethod
    def backward(ctx, *gradients):
        """dL/dc_i = Σ over the broadcast axes of dL/dW * D_i."""
        by_c: list[Tensor | None] = [None] * len(gradients)
        wanted = [number for number, gradient in enumerate(gradients) if gradient is not None]
        wanted = [n for n in wanted if ctx.needs_input_grad[n - len(gradients)]]
        if wanted:
            kernels = _kernels(gradients[wanted[0]].device)
            found = (kernels.gradient if kernels else _gradient)(
                [gradients[n] for n in wanted], ctx.again(wanted), [ctx.shapes[n] for n in wanted]
            )
            for number, own in zip(wanted, found, strict=True):
                by_c[number] = own.float()
        return None, None, None, None, *by_c


def _combine(
    coefficients: Sequence[Tensor],
    inputs: Sequence[Inputs],
    dtypes: Sequence[torch.dtype],
    stored: Sequence[torch.dtype],
) -> list[Tensor]:
    made = []
    for factors, own, dtype, given in zip(coefficients, inputs, dtypes, stored, strict=True):
        sources = own.parts[0]
        merged = torch.empty_like(sources[0], dtype=given)
        count, is_prepared = len(sources), own.prepared is not None
        for out, base, *parts in in_pieces(merged, own.base, *factors, *sources):
            _combine_part(out, parts[:count], parts[count:], base, dtype, is_prepared)
        made.append(merged)
    return made


def _gradient(
    gradients: Sequence[Tensor], inputs: Sequence[Inputs], shapes: Sequence[Sequence[int]]
) -> list[Tensor]:  # [N, *B], the shapes
    return [
        _gradient_of_one(gradient, *own.parts, shape)
        for gradient, own, shape in zip(gradients, inputs, shapes, strict=True)
    ]


def _gradient_of_one(
    gradient: Tensor, sources: Sequence[Tensor], base: Tensor | None, shape: Sequence[int]
) -> Tensor:  # [N, *B], which is `shape`
    accumulator = _accumulator(sources)
    sums = torch.zeros(len(sources), *shape[1:], dtype=accumulator, device=gradient.device)
    for outer, subtracted, *parts in in_pieces(gradient, base, *sources, *sums):
        own, totals = parts[: len(sources)], parts[len(sources) :]
        outer = outer.to(accumulator)
        for total, source in zip(totals, own, strict=True):
            total += (outer * _difference(source, subtracted)).sum_to_size(total.shape)
    return sums


def _combine_part(
    out: Tensor,
    coefficients: Sequence[Tensor],
    sources: Sequence[Tensor],
    base: Tensor | None,
    dtype: torch.dtype,  # what it is rounded to
    prepared: bool,
) -> None:
    accumulator = _accumulator(sources)
    merged = out if out.dtype == accumulator else torch.empty_like(out, dtype=accumulator)
    factors = [coefficient.to(accumulator) for coefficient in coefficients]
    if base is None:
        torch.mul(sources[0], factors[0], out=merged)
        for source, factor in zip(sources[1:], factors[1:], strict=True):
            merged.addcmul_(source, factor)
    else:  # rounded as mergekit rounds task vectors, the base last: bit for bit the same
        merged.zero_()
        for source, factor in zip(sources, factors, strict=True):
            merged.add_(_difference(source, None if prepared else base) * factor)
        merged.add_(base)
    if dtype not in (merged.dtype, out.dtype):
        merged = merged.to(dtype)
    if merged is not out:
        out.copy_(merged)


def at_once(device: torch.device) -> int:
    """How many numbers are worked on at a time."""
    return CACHED if device.type == "cpu" else PASSING


def in_pieces(whole: Tensor, *others: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """Rows of a tensor, and of those of its shape or broadcast to it, as many as are worked on at a
    time; views."""
    most, tensors = at_once(whole.device), (whole, *others)
    if whole.numel() <= most or whole.dim() < 2:
        yield tensors
        return
    row = whole.numel() // len(whole)
    if row > most and whole.dim() > 2:  # a stack of matrices
        for index in range(len(whole)):
            yield from in_pieces(*(t if t is None else t[min(index, len(t) - 1)] for t in tensors))
        return
    size = max(1, most // row)
    count = -(-len(whole) // size)
    yield from zip(
        *([t] * count if t is None or len(t) < len(whole) else t.split(size) for t in tensors),
        strict=True,
    )


def alignment(
    first: Tensor, second: Tensor, base: Tensor | None, shape: Sequence[int]
) -> Tensor:  # B
    """Cosine of D_i and D_j over the axes that B sums up: of their columns, for `column`."""
    sums = torch.zeros(3, *shape, device=first.device)
    for one, other, subtracted, *totals in in_pieces(first, second, base, *sums):
        d, e = (_difference(source, subtracted).float() for source in (one, other))
        for total, product in zip(totals, (d * e, d * d, e * e), strict=True):
            total += product.sum_to_size(total.shape)
    dot, dd, ee = sums
    return dot / (dd * ee).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
