"""Products of layers on a CPU, by the library of torch's that is fastest there.

torch leaves products in float32 to Intel's MKL, which computes on other makers' processors without
their AVX-512. oneDNN, to which torch leaves narrower numbers, computes with it: in about half of
the time.
"""

import functools
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

# Rows. For each number of them that it has seen oneDNN keeps code: so it gets whole parts, whose
# number varies little, and MKL what is left.
PART = 128
CODE = 600_000  # bytes of it, about, for a product
MOST = 1024  # products whose code it keeps
LEAST = 2**18  # numbers of a weight; with fewer a call takes longer than it saves
# What MKL made of the rows that are left is put beside the rest by a copy: not where outputs are so
# many times the inputs, as logits are, of which two would be there at once.
WIDE = 4
# Outputs. To sum up rows' products oneDNN copies their gradients: of so many at a time.
SUMMED = 512


@contextmanager
def fast_products(device: torch.device | None) -> Iterator[None]:
    """A context in which `torch.nn.functional.linear` is computed so; its gradients are, too,
    wherever their pass runs. Within float32 rounding the same. Without a device as usual.

    Its gradients have none in their turn, and `torch.func` does not know them. Layers that keep
    their weights another way do not come here: experts in one tensor, GPT-2's `Conv1D`.
    """
    if device is None or device.type != "cpu" or not onednn_is_faster():
        yield
        return
    before = F.linear

    def faster(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return (_linear if _is_served(input, weight, bias) else before)(input, weight, bias)

    F.linear = faster
    try:
        yield
    finally:
        F.linear = before


def kept_code(
    weights: Collection[Sequence[int]],  # their shapes [out, in]
    trained: Collection[int],  # each number of rows that goes through with gradients
    untrained: Collection[int],  # and without
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Bytes that oneDNN keeps for such layers: of each product, with gradients three."""
    if dtype != torch.float32 or device.type != "cpu" or not onednn_is_faster():
        return 0
    numbers = [{_whole(rows) for rows in own} - {0} for own in (trained, untrained)]
    products = 3 * len(numbers[0]) + len(numbers[1])
    return CODE * min(MOST, products * len({tuple(w) for w in weights if math.prod(w) >= LEAST}))


@functools.cache
def onednn_is_faster() -> bool:
    """Told by what the processor is: two measurements might choose differently in two runs, and
    results would differ in their last bits."""
    processor = getattr(torch.cpu, "get_capabilities", dict)()
    return (
        "AMD" in processor.get("cpu_name", "")
        and processor.get("avx512_f", False)
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _is_served(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Plain matrices, large enough."""
    return (
        all(map(_is_plain, (input, weight)))
        and weight.dim() == 2
        and weight.numel() >= LEAST
        and input.numel() >= PART * weight.shape[1]
        and (bias is None or (_is_plain(bias) and _is_dense(bias, len(weight))))
        and not torch.is_autocast_enabled("cpu")
    )


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.layout == torch.strided
    )


def _is_dense(bias: Tensor, outputs: int) -> bool:
    """oneDNN takes any for such."""
    return bias.shape == (outputs,) and bias.is_contiguous()


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[.., in], [out, in], [out] -> [.., out], which may be changed in place."""
    made = _Linear.apply(input.reshape(-1, input.shape[-1]), weight, bias)
    return made.view(*input.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    """Keeps what `torch.nn.functional.linear` keeps."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return _product(x.contiguous(), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, outer):
        (x, weight), outer = ctx.saved_tensors, outer.contiguous()
        return (
            None if weight is None else _product(outer, weight.t()),
            None if x is None else _summed(outer, x.contiguous()),
            outer.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[rows, in], [out, in], [out] -> [rows, out]"""
    whole = _whole(len(x))
    if whole == len(x):
        return _by_onednn(x, weight, bias)
    if len(weight) > WIDE * x.shape[1]:
        return linear(x, weight, bias)
    made = _by_onednn(x[:whole], weight, bias)
    return torch.cat([made, linear(x[whole:], weight, bias)])


def _summed(outer: Tensor, x: Tensor) -> Tensor:
    """[rows, out], [rows, in] -> [out, in], the sum of each row's product."""
    whole = _whole(len(x))
    result = x.new_empty(outer.shape[1], x.shape[1])
    for made, own in zip(result.split(SUMMED), outer[:whole].split(SUMMED, 1), strict=True):
        made.copy_(_by_onednn(own.t(), x[:whole].t()))
    return result if whole == len(x) else result.addmm_(outer[whole:].t(), x[whole:])


def _whole(rows: int) -> int:
    return rows // PART * PART


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
