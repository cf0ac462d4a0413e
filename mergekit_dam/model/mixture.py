"""One forward pass for rows of several sources, each with its own source's weights.

A small kernel takes the processor longer to start than a GPU to compute. So modules that own
weights run for each source on its rows, and everything between them, most of a layer's operations,
once for all. No code here is for one architecture: whether a model can run so is tried.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_dam.errors import in_one_line
from mergekit_dam.model.block import Block
from mergekit_dam.model.lookup import told
from mergekit_dam.model.split import rounding

Weights = Mapping[str, Tensor]
DEVICES = {"cuda"}  # of these types; a CPU gains nothing
LOG = logging.getLogger(__name__)


def serves(device: torch.device) -> bool:
    """Whether it is worth while there."""
    return device.type in DEVICES


class NotMixedError(Exception):
    """A module does something else with its rows than this can follow."""


@dataclass(frozen=True)
class Mixture:
    """The view of a pass in which each row sees its own source's weights."""

    owners: tuple[int, ...]  # the source of each row, ascending
    length: int  # of the rows

    @functools.cached_property
    def counts(self) -> dict[int, int]:
        """Each source, and how many rows are its."""
        return {source: len(list(own)) for source, own in itertools.groupby(self.owners)}

    def of_rows(self, value: Any) -> Tensor:
        """[rows, .., width] with all their positions, or ids [rows, length]. What is the same for
        all rows is made one for each. Raises NotMixedError for what may be something else."""
        if not isinstance(value, Tensor) or value.dim() < 2 + value.is_floating_point():
            raise NotMixedError("arguments that are not of whole rows")
        count, *places = value.shape
        if self.length not in (places[:-1] or places) or count not in (1, len(self.owners)):
            raise NotMixedError(f"{tuple(value.shape)} where rows were expected")
        return value.expand(len(self.owners), *places) if count == 1 else value


class Mixer:
    """Runs a model's blocks for a mixture; it knows the modules that own their weights."""

    def __init__(self):
        self.works: bool | None = None  # with this model; None where nobody has tried
        self._owners: dict[Block, dict[nn.Module, _Owner]] = {}

    def run_each(
        self,
        block: Block,
        weights: Mapping[int, Weights],  # source -> its weights, as `Block.weights` has them
        mixture: Mixture,
        calls: Sequence[tuple[tuple, dict]],
    ) -> list[Any]:
        """A block's outputs. Raises NotMixedError for whatever goes wrong, and no longer `works`:
        what would go wrong for each source by itself will do so again."""
        if block not in self._owners:
            self._owners[block] = {m: _Owner(m, own) for m, own in block.owners().items()}
        owners = self._owners[block]
        forwards = {m: functools.partial(o, weights, mixture) for m, o in owners.items()}
        try:
            with _instead_of_forward(forwards), _unread(owners.values()):
                return [block.block(*args, **kwargs) for args, kwargs in calls]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._give_up(block, error)
            raise NotMixedError(str(error)) from error

    def _give_up(self, block: Block, error: Exception) -> None:
        if self.works:  # and has not just been tried
            LOG.warning(
                "%s cannot run for several sources at once, so they teach one by one: %s",
                block.path,
                in_one_line(error),
            )
        self.works = False


def agrees(
    states: Callable[[list[tuple[Tensor, Any]]], list[Tensor]],  # of passes: ids and view
    vocabulary: int,
    device: torch.device,
) -> bool:
    """Whether a model gives rows of two sources in one pass what it gives them in two. Tried on a
    few tokens, in sizes that are not likely to be any other of the model's.

    Products of other shapes are rounded in other ways: through 32 layers in bfloat16 to a fortieth
    of the largest state.
    """
    ids = torch.arange(15, device=device).view(3, 5) * max(1, vocabulary // 15) % vocabulary
    passes = [(ids[:1], 0), (ids[1:], 1), (ids, Mixture((0, 1, 1), 5))]
    try:
        *expected, found = states(passes)
    except NotMixedError:
        return False
    expected = torch.cat(expected)
    bound = 4 * rounding(expected, found.dtype)
    return bool((found - expected).abs().max() <= bound)


@contextmanager
def _instead_of_forward(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """A context in which modules run something else. (Through `__dict__`, since `nn.Module` takes
    its time over a `setattr`.)"""
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


@contextmanager
def _unread(owners: Iterable["_Owner"]) -> Iterator[None]:
    """A context in which nothing but their owners can compute with weights."""
    for owner in owners:
        owner.hide()
    try:
        yield
    finally:
        for owner in owners:
            owner.put_back()


class _Hidden(Tensor):
    """Has a shape, a dtype and a device, for which models ask, and numbers for nobody."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if (answer := told(function, args)) is NotImplemented:
            raise NotMixedError(f"{function.__name__} of a weight outside of its module")
        return answer


class _Owner:
    """A module that owns weights."""

    def __init__(self, module: nn.Module, places: Mapping[str, tuple[dict, str]]):
        self._forward, self._places = module.forward, places
        self._own = {name: place[leaf] for name, (place, leaf) in places.items()}
        self._hidden = {name: own.detach().as_subclass(_Hidden) for name, own in self._own.items()}
        self._spreads: bool | None = None  # whether it can have a weight for each row

    def hide(self) -> None:
        self._put(self._hidden)

    def put_back(self) -> None:
        self._put(self._own)

    def _put(self, weights: Weights) -> None:
        for name, (place, leaf) in self._places.items():
            place[leaf] = weights[name]

    def __call__(self, weights: Mapping[int, Weights], mixture: Mixture, *args, **kwargs) -> Tensor:
        if kwargs or not args:
            raise NotMixedError(f"arguments {[*kwargs]}")
        args = [mixture.of_rows(part) for part in args]
        try:
            if self._can_spread(args):
                return self._spread(weights, mixture, *args)
            return self._each(weights, mixture, *args)
        finally:
            self.hide()

    def _each(self, weights: Mapping[int, Weights], mixture: Mixture, *args: Tensor) -> Tensor:
        """For each source on its rows."""
        found, sizes = [], list(mixture.counts.values())
        parts = zip(*(part.split(sizes) for part in args), strict=True)
        for source, own in zip(mixture.counts, parts, strict=True):
            self._put(weights[source])
            found.append(self._forward(*own))
        return mixture.of_rows(torch.cat(found))

    def _spread(self, weights: Mapping[int, Weights], mixture: Mixture, x: Tensor) -> Tensor:
        """Once, with a weight [rows, 1, .., width]: a norm is many small operations."""
        (name,) = self._places
        shape = [1] * (x.dim() - 2) + [-1]
        rows = {source: weights[source][name].view(shape) for source in mixture.counts}
        self._put({name: torch.stack([rows[source] for source in mixture.owners])})
        return self._forward(x)

    def _can_spread(self, args: Sequence[Tensor]) -> bool:
        """Tried once, on numbers of its own."""
        if self._spreads is None:
            self._spreads = len(args) == len(self._places) == 1 and self._tries_to_spread(*args)
        return self._spreads

    def _tries_to_spread(self, x: Tensor) -> bool:
        ((name, weight),) = self._own.items()
        if weight.dim() != 1 or not x.is_floating_point() or x.shape[-1] != len(weight):
            return False
        numbers = torch.arange(6 * x[0, 0].numel(), device=x.device).sin()
        trial = numbers.view(3, 2, *x.shape[2:]).to(x.dtype)
        weights = {n: {name: trial[n, 0].flatten()[: x.shape[-1]].exp()} for n in (0, 1)}
        given = weights, Mixture((0, 1, 1), 2), trial
        try:
            return torch.equal(self._spread(*given), self._each(*given))
        except Exception:  # whatever a module raises that expects one weight for all
            return False
