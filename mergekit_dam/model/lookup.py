"""A table of which an embedding takes some rows: only these are made.

A step looks up a few thousand rows of a vocabulary of perhaps 150,000, whose table may be a third
of a small model's weights: made whole it would be read, and its gradient summed, for nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

# What models ask of a weight without computing with it; the first is any attribute's.
ASKED = ("__get__", "size", "dim", "numel", "is_floating_point")


def told(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """What a weight tells that has no numbers: its shape, its dtype, its device. NotImplemented
    where these are wanted, as by the attributes `T` and `data`."""
    if function.__name__ not in ASKED:
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        answer = function(*args)
    return NotImplemented if isinstance(answer, Tensor) else answer


class Lookup(Tensor):
    """Stands in the place of a weight [rows, width]; a single NaN in memory.

    `torch.nn.functional.embedding` gets the rows that it looks up; whatever else computes with it
    gets the weight whole.
    """

    @staticmethod
    def __new__(
        cls,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[[Tensor | None], Tensor],  # of rows [n] -> [n, width]; of None the weight
    ):
        nan = torch.full((), torch.nan, dtype=dtype, device=device)
        self = nan.expand(shape).as_subclass(cls)
        self.make = make
        return self

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.embedding and _is_plain(**kwargs):
            return _looked_up(*args, padding=kwargs.get("padding_idx"))
        if (answer := told(function, args)) is not NotImplemented:
            return answer
        args, kwargs = tree_map_only(Lookup, lambda table: table.make(None), (args, kwargs))
        return function(*args, **kwargs)


def _is_plain(max_norm=None, scale_grad_by_freq=False, sparse=False, **_others) -> bool:
    """Whether rows and their gradients are used as they are."""
    return max_norm is None and not scale_grad_by_freq and not sparse


def _looked_up(ids: Tensor, table: Lookup, *, padding: int | None) -> Tensor:  # [.., width]
    found = table.make(ids.flatten())
    found = found.view(*ids.shape, found.shape[-1])
    if padding is not None and found.requires_grad:
        is_padding = (ids == padding).unsqueeze(-1)
        found.register_hook(lambda gradient: gradient.masked_fill(is_padding, 0))
    return found
