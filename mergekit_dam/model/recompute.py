"""What a block keeps between its forward and its backward pass; its gradients are the same.

- `block`: its inputs; the backward pass makes weights and activations again;
- `weights`: its activations too; the backward pass makes the weights again, one block's at a time;
- `none`: everything.
"""

import contextlib
import copy
import weakref
from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mergekit_dam.errors import DamError
from mergekit_dam.model.attention import as_usual, in_one_order
from mergekit_dam.model.block import Block
from mergekit_dam.model.live import storage_of, tensors
from mergekit_dam.model.lookup import Lookup

Recompute = Literal["block", "weights", "none"]
VIEW = "merge"  # the one that has gradients
CONTAINERS = (UserDict, dict, list)


@in_one_order()
def run(block: Block, calls: Sequence[tuple[tuple, dict]], recompute: Recompute) -> list[Any]:
    """A block's outputs for several calls, with gradients."""
    if recompute == "none":
        return block.run_each(calls, _weights(block))
    if recompute == "block":
        with _without_activations(block, calls):
            return block.run_each(calls, _weights(block))
    weights = _weights(block)
    with _without_weights(block, weights):
        return block.run_each(calls, weights)


def _weights(block: Block) -> dict[str, Tensor]:
    return block.weights(VIEW, whole=False)


def _without_activations(block: Block, calls: Sequence[tuple[tuple, dict]]) -> saved_tensors_hooks:
    """A context in which autograd saves a number in each tensor's place.

    The backward pass runs the block again, up to the last tensor that it needs. As
    `torch.utils.checkpoint` does it, which serves more purposes, and takes the processor about a
    millisecond more for a block: longer than a GPU computes a short step's.
    """
    activations = _Activations(block, calls)
    return saved_tensors_hooks(activations.place, activations.of)


class _Place:
    """What autograd keeps in a tensor's place."""

    __slots__ = ("__weakref__", "number", "shape")

    def __init__(self, number: int, shape: torch.Size):
        self.number, self.shape = number, shape


class _Activations:
    """What autograd saves of a block's calls, made again when it is asked for, and given away."""

    def __init__(self, block: Block, calls: Sequence[tuple[tuple, dict]]):
        self._block, self._calls = block, _with_own_containers(calls)
        self._given = {storage_of(tensor) for tensor in tensors(calls)}  # which are there anyway
        self._places: list[weakref.ref[_Place]] = []  # some die: of results that nothing used
        self._made: dict[int, Tensor] = {}
        self._seen = 0  # when they are made again

    def place(self, saved: Tensor) -> "_Place | Tensor":
        if storage_of(saved) in self._given:  # of a plain table the ids: nothing is made again
            return saved
        place = _Place(len(self._places), saved.shape)
        self._places.append(weakref.ref(place))
        return place

    def of(self, place: "_Place | Tensor") -> Tensor:
        if isinstance(place, Tensor):
            return place
        if place.number not in self._made:
            self._make()
        return self._made.pop(place.number)

    def _make(self) -> None:
        self._made, self._seen = {}, 0
        hooks = saved_tensors_hooks(self._keep, lambda nothing: nothing)
        with contextlib.suppress(_Enough), torch.enable_grad(), hooks, as_usual():
            calls = _with_own_containers(self._calls)  # what this run writes goes
            self._block.run_each(calls, _weights(self._block))
        self._require(self._seen == len(self._places))

    def _keep(self, saved: Tensor) -> None:
        if storage_of(saved) in self._given:
            return
        place, self._seen = self._places[self._seen](), self._seen + 1
        if place is not None:
            self._require(place.shape == saved.shape)
            self._made[place.number] = saved.detach()
        if self._seen == len(self._places):
            raise _Enough

    def _require(self, is_same: bool) -> None:
        if not is_same:
            raise DamError(
                f"{self._block.path} of the model does something else each time it runs, so its "
                "activations cannot be made again: set `dam.recompute: weights`."
            )


class _Enough(Exception):
    """Ends a run where all is made that is needed."""


def _with_own_containers(calls: Sequence[tuple[tuple, dict]]) -> list[tuple[tuple, dict]]:
    """Calls with copies of containers, which blocks may write to (keys and values that layers
    share). What a run writes there has its graph, and that holds these calls: with the same
    container they would keep each other."""

    def own(given: Any) -> Any:
        return copy.copy(given) if isinstance(given, CONTAINERS) else given

    return [
        (tuple(map(own, args)), {name: own(value) for name, value in kwargs.items()})
        for args, kwargs in calls
    ]


def _without_weights(block: Block, weights: Mapping[str, Tensor]) -> saved_tensors_hooks:
    """A context in which autograd saves a weight's name and view in its place.

    The weight is made again in the backward pass, and given back when that has left the block.
    """
    made = {n: w for n, w in weights.items() if not isinstance(w, Lookup) and w.numel()}
    storages = {storage_of(weight): name for name, weight in made.items()}
    again = _Again(block)

    def pack(saved: Tensor) -> Any:
        name = storages.get(storage_of(saved))
        if name is None:  # an operation's own result would keep it, where no gradient comes
            return saved.detach() if saved.requires_grad else saved
        return name, saved.shape, saved.stride(), saved.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        name, *view = packed
        return again.weights()[name].as_strided(*view)

    return saved_tensors_hooks(pack, unpack)


class _Again:
    """A block's weights for the backward pass. Only the block that was asked last has them, until
    another one is asked or the pass ends (after an error, until the next forward pass)."""

    _last: "_Again | None" = None

    def __init__(self, block: Block):
        self._block, self._weights = block, None
        _Again._let_go()

    def weights(self) -> Mapping[str, Tensor]:
        if self._weights is None:
            _Again._let_go()
            torch.autograd.Variable._execution_engine.queue_callback(_Again._let_go)
            with torch.no_grad():
                self._weights = _weights(self._block)
            _Again._last = self
        return self._weights

    @staticmethod
    def _let_go() -> None:
        if _Again._last is not None:
            _Again._last._weights = None
            _Again._last = None
