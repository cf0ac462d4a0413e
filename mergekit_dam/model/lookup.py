"""A table of which an embedding takes some rows: only these are made.

A step looks up a few thousand rows of a vocabulary of perhaps 150,000, whose table may be a third
of a small model's weights: made whole it would be read, and its gradient summed, for nothing.
Of a small table it may look up more rows than there are: that is made whole.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

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


def few(rows: int, inputs: int) -> int:
    """How many rows of a table take less memory alone, copied from each of its inputs and made,
    than the table does."""
    return rows // (inputs + 1)


class Lookup(Tensor):
    """Stands in the place of a weight [rows, width]; a single NaN in memory.

    `torch.nn.functional.embedding` gets the rows that it looks up, if they are few; whatever else
    computes with it gets the weight whole, which is made once.
    """

    @staticmethod
    def __new__(
        cls,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        few: int,  # rows at most that are made alone, in all calls together
        make: Callable[[Tensor | None], Tensor],  # of rows [n] -> [n, width]; of None the weight
    ):
        nan = torch.full((), torch.nan, dtype=dtype, device=device)
        self = nan.expand(shape).as_subclass(cls)
        self._left, self.make, self._has_gradients = few, make, torch.is_grad_enabled()
        self._whole: Tensor | None = None
        return self

    def whole(self) -> Tensor:
        if self._whole is None:
            with torch.set_grad_enabled(self._has_gradients):  # whoever asks first
                self._whole = self.make(None)
        return self._whole

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.embedding and _is_plain(**kwargs):
            ids, table = args
            table._left -= ids.numel()
            if table._left >= 0:
                return _looked_up(ids, table, padding=kwargs.get("padding_idx"))
        if (answer := told(function, args)) is not NotImplemented:
            return answer
        args, kwargs = tree_map_only(Lookup, lambda table: table.whole(), (args, kwargs))
        return function(*args, **kwargs)


def _is_plain(max_norm=None, scale_grad_by_freq=False, sparse=False, **_others) -> bool:
    """Whether rows and their gradients are used as they are."""
    return max_norm is None and not scale_grad_by_freq and not sparse


def _looked_up(ids: Tensor, table: Lookup, *, padding: int | None) -> Tensor:  # [.., width]
    found = table.make(ids.flatten())
    found = found.view(*ids.shape, found.shape[-1])
    if padding is not None and found.requires_grad:
        is_padding = (ids == padding % len(table)).unsqueeze(-1)  # -1 is the last
        found.register_hook(lambda gradient: gradient.masked_fill(is_padding, 0))
    return found
