"""What a block keeps between its forward and its backward pass; its gradients are the same.

- `block`: its inputs; the backward pass makes weights and activations again;
- `weights`: its activations too; the backward pass makes the weights again, one block's at a time;
- `none`: everything.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mergekit_dam.errors import DamError
from mergekit_dam.model.block import Block

Recompute = Literal["block", "weights", "none"]


def run(block: Block, calls: Sequence[tuple[tuple, dict]], recompute: Recompute) -> list[Any]:
    """A block's outputs for several calls, with gradients."""
    if recompute == "none":
        return block.run_each(calls)
    if recompute == "block":
        with _without_activations(block, calls):
            return block.run_each(calls)
    weights = block.weights()
    with _without_weights(block, weights):
        return block.run_each(calls, weights)


def _without_activations(block: Block, calls: Sequence[tuple[tuple, dict]]) -> saved_tensors_hooks:
    """A context in which autograd saves a number in each tensor's place.

    The backward pass runs the block again, up to the last tensor that it needs. As
    `torch.utils.checkpoint` does it, which serves more purposes, and takes the processor about a
    millisecond more for a block: longer than a GPU computes a short step's.
    """
    activations = _Activations(block, calls)
    return saved_tensors_hooks(activations.number, activations.of)


class _Activations:
    """What autograd saves of a block's calls, made again when it is asked for, and given away."""

    def __init__(self, block: Block, calls: Sequence[tuple[tuple, dict]]):
        self._block, self._calls, self._count = block, calls, 0
        self._made: dict[int, Tensor] = {}

    def number(self, saved: Tensor) -> int:
        self._count += 1
        return self._count - 1

    def of(self, number: int) -> Tensor:
        if number not in self._made:
            self._make()
        return self._made.pop(number)

    def _make(self) -> None:
        self._made = {}
        with contextlib.suppress(_Enough), torch.enable_grad(), self._keeping():
            self._block.run_each(self._calls)
        if len(self._made) != self._count:
            raise DamError(
                f"{self._block.path} of the model does something else each time it runs, so its "
                "activations cannot be made again: set `dam.recompute: weights`."
            )

    def _keeping(self) -> saved_tensors_hooks:
        def keep(saved: Tensor) -> None:
            self._made[len(self._made)] = saved.detach()
            if len(self._made) == self._count:
                raise _Enough

        return saved_tensors_hooks(keep, lambda nothing: nothing)


class _Enough(Exception):
    """Ends a run where all is made that is needed."""


def _without_weights(block: Block, weights: Mapping[str, Tensor]) -> saved_tensors_hooks:
    """A context in which autograd saves a weight's name and view in its place.

    The weight is made again in the backward pass, and given back when that has left the block.
    """
    storages = {w.untyped_storage().data_ptr(): name for name, w in weights.items() if w.numel()}
    again = _Again(block)

    def pack(saved: Tensor) -> Any:
        name = storages.get(saved.untyped_storage().data_ptr())
        if name is None:
            return saved
        return name, saved.shape, saved.stride(), saved.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        name, *view = packed
        return again.weights()[name].as_strided(*view)

    return saved_tensors_hooks(pack, unpack)


class _Again:
    """A block's weights for the backward pass. Only the block that was asked last has them."""

    _last: "_Again | None" = None

    def __init__(self, block: Block):
        self._block, self._weights = block, None
        _Again._let_go()

    def weights(self) -> Mapping[str, Tensor]:
        if self._weights is None:
            _Again._let_go()
            with torch.no_grad():
                self._weights = self._block.weights()
            _Again._last = self
        return self._weights

    @staticmethod
    def _let_go() -> None:
        if _Again._last is not None:
            _Again._last._weights = None
            _Again._last = None
