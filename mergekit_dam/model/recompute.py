"""What a block keeps between its forward and its backward pass; its gradients are the same.

- `block`: its inputs; the backward pass makes weights and activations again;
- `weights`: its activations too; the backward pass makes the weights again, one block's at a time;
- `none`: everything.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from mergekit_dam.model.block import Block

Recompute = Literal["block", "weights", "none"]


def run(block: Block, calls: Sequence[tuple[tuple, dict]], recompute: Recompute) -> list[Any]:
    """A block's outputs for several calls, with gradients."""
    if recompute == "block":
        return checkpoint(block.run_each, calls, use_reentrant=False, preserve_rng_state=False)
    if recompute == "none":
        return block.run_each(calls)
    weights = block.weights()
    with _without_weights(block, weights):
        return block.run_each(calls, weights)


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
