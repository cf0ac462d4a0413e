"""A table of which an embedding takes some rows: only these are made.

A step looks up a few thousand rows of a vocabulary of perhaps 150,000, whose table may be a third
of a small model's weights: made whole it would be read, and its gradient summed, for nothing.
Of a small table it may look up more rows than there are: that is made whole, and so is one whose
rows have coefficients of their own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mergekit_dam.formula import at_once

# What models ask of a weight without computing with it; the first is any attribute's.
ASKED = ("__get__", "__len__", "size", "dim", "numel", "is_floating_point")


def told(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """What a weight tells that has no numbers: its shape, its dtype, its device. NotImplemented
    where these are wanted, as by the attributes `T` and `data`."""
    if function.__name__ not in ASKED:
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        answer = function(*args)
    return NotImplemented if isinstance(answer, Tensor) else answer


def is_shared(coefficients: Sequence[int]) -> bool:
    """Whether all rows of a table have the same, by their shape [*B]."""
    return coefficients[0] == 1


class Lookup(Tensor):
    """Stands in the place of a weight [rows, width]; a single NaN in memory.

    `torch.nn.functional.embedding` gets the rows that it looks up, as long as these are not more
    than the weight has; whatever else computes with it gets the weight whole, which is made once.
    """

    @staticmethod
    def __new__(
        cls,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[[Tensor | None], Tensor],  # of ids [n] -> [n, width]; of None the weight
        *,
        alone: bool = True,  # whether rows are made without the others
    ):
        nan = torch.full((), torch.nan, dtype=dtype, device=device)
        self = nan.expand(shape).as_subclass(cls)
        self._left, self._make, self._whole = shape[0] * alone, make, None
        self._has_gradients = torch.is_grad_enabled()
        return self

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.embedding and _is_plain(**kwargs):
            ids, table = args
            return _without_padding(table.look_up(ids), ids, len(table), kwargs.get("padding_idx"))
        if (answer := told(function, args)) is not NotImplemented:
            return answer
        args, kwargs = tree_map_only(Lookup, lambda table: table.whole(), (args, kwargs))
        return function(*args, **kwargs)

    def look_up(self, ids: Tensor) -> Tensor:  # [..] -> [.., width]
        """A part at a time, so that what the rows are made of is never there for all of them."""
        self._left -= ids.numel()
        if self._left < 0:  # gradients of several calls are added up as rows, not as tables
            return F.embedding(ids, self.whole(), sparse=True)
        width = self.shape[-1]
        parts = ids.flatten().split(max(1, at_once(self.device) // width))
        made = [self._make(part) for part in parts]
        return (torch.cat(made) if len(made) > 1 else made[0]).view(*ids.shape, width)

    def whole(self) -> Tensor:
        if self._whole is None:
            with torch.set_grad_enabled(self._has_gradients):  # whoever asks first
                self._whole = _Table.apply(self._make(None))
        return self._whole


def _is_plain(max_norm=None, scale_grad_by_freq=False, sparse=False, **_others) -> bool:
    """Whether rows and their gradients are used as they are."""
    return max_norm is None and not scale_grad_by_freq and not sparse


def _without_padding(found: Tensor, ids: Tensor, rows: int, padding: int | None) -> Tensor:
    """Rows, of which that for padding has no gradient."""
    if padding is not None and found.requires_grad:
        is_padding = (ids == padding % rows).unsqueeze(-1)  # -1 is the last
        found.register_hook(lambda gradient: gradient.masked_fill(is_padding, 0))
    return found


class _Table(torch.autograd.Function):
    """Adds up the rows of its gradient when all are there, in their order (on a GPU, too, the same
    each time), in float32: in bfloat16 most of a frequent token's would be lost."""

    @staticmethod
    def forward(ctx, table: Tensor) -> Tensor:
        return table.view_as(table)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        if not gradient.is_sparse:
            return gradient
        wide = torch.promote_types(gradient.dtype, torch.float32)
        return gradient.to(wide).coalesce().to_dense().to(gradient.dtype)
