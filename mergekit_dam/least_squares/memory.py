"""What the least-squares start keeps in memory, found by a pass of its largest chunk of rows
through the model on tensors without storage."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import prod
from operator import add
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from mergekit_dam.data import Row
from mergekit_dam.least_squares import objective
from mergekit_dam.least_squares.rows import chunks, split
from mergekit_dam.model import Skeleton
from mergekit_dam.model.live import Live, storage_of, tensors
from mergekit_dam.model.skeleton import blocks_of, make_model
from mergekit_dam.model.storageless import inner_width, without_storage

PATHS = 2  # of each chunk: the merge's and the source's
VECTORS = 8  # of conjugate gradients
KINDS = 2  # of rows, each with sums of its own
NORM = (4, 5)  # copies of what a norm is given: as it is, and as the sums take it, in float32
MADE = 2  # of a part of a weight: its product, and that with what a source has for it


@dataclass(frozen=True)
class StartNeeds:
    """Of the start, in bytes, without the sources."""

    most: int
    copies: int  # one block of every source, where it is cast or brought to the device

    def of(self, *, is_copied: bool) -> int:
        return self.most + (self.copies if is_copied else 0)


def start_needs(
    config: PretrainedConfig,
    skeleton: Skeleton,
    dtype: torch.dtype,
    rows: Sequence[Sequence[Row]],  # of each source
    trained: Collection[str],  # output tensors
    sources: int,  # with the base
    places: int,  # of coefficients, of each source for one tensor at most
    *,
    trust_remote_code: bool,
    device: str = "cpu",
) -> StartNeeds:
    text, solved, peaks = config.get_text_config(), _solved(skeleton, trained), []
    found = [c for own in rows for part in split(own) for c in chunks(part, text.vocab_size)]
    shapes = [(len(chunk), len(chunk[0])) for chunk in found]
    largest = {max(shapes, key=prod), max(shapes, key=lambda shape: prod(shape) * shape[1])}
    for shape in largest:  # of most positions, and of most pairs of them in a row
        blocks = _try(
            config, dtype, solved, shape, trust_remote_code=trust_remote_code, device=device
        )
        is_padded = any(len(c[-1]) < len(c[0]) for c in found if (len(c), len(c[0])) == shape)
        own = Chunk(prod(shape), text.hidden_size, dtype.itemsize, is_padded, sources)
        peaks.append(own.most(blocks, shape, shapes) + _solving(places, sources))
    size = max(block.size for block in blocks)
    return StartNeeds(int(max(peaks)), len(rows) * size)


def _try(
    config: PretrainedConfig,
    dtype: torch.dtype,
    solved: Collection[str],
    shape: tuple[int, int],  # rows, tokens of each
    *,
    trust_remote_code: bool,
    device: str,
) -> "list[Seen]":
    def run() -> list[Seen]:
        model = make_model(config, dtype, trust_remote_code=trust_remote_code)
        return _pass(model, solved, shape)

    def estimate() -> list[Seen]:
        return _estimate(config, dtype.itemsize, prod(shape))

    return without_storage(run, estimate, "the start", device)


def _solving(places: int, sources: int) -> int:
    """Second derivatives of the coefficients at each place, in float32 and float64, their factors
    in float64, and what conjugate gradients go along with."""
    return places * (20 * sources**2 + 4 * VECTORS * sources)


def _solved(skeleton: Skeleton, trained: Collection[str]) -> set[str]:
    """The modules whose weights are solved; a tied weight once."""
    first = {name: path for path, name in reversed(skeleton.tensors.items())}
    return {
        path.removesuffix(".weight")
        for name, path in first.items()
        if name in trained and path.endswith(".weight")
    }


@dataclass
class Group:
    """Layers of one input."""

    inputs: int
    outputs: list[int] = field(default_factory=list)  # of each layer
    working: int = 0  # bytes of what is there at once until all of them have run
    reaching: int = 0  # and until the next group's run


@dataclass(frozen=True)
class Given:
    """A tensor whose size depends on rows and their length."""

    size: int  # bytes
    of_rows: bool  # whether it grows with their number
    axes: int  # that grow with their length

    def of(self, rows: int, length: int) -> int:
        """To its size, for other rows; but for a factor."""
        return (rows if self.of_rows else 1) * length**self.axes


@dataclass
class Seen:
    """A block, as a pass has seen it."""

    size: int  # bytes of its weights
    states: int = 0  # bytes of what the model holds before it
    given: tuple[Given, ...] = ()  # and of what it gives to blocks beside the states: masks, ...
    working: int = 0  # bytes of what else is there at once as it runs
    groups: list[Group] = field(default_factory=list)  # of layers that are solved
    normed: int = 0  # numbers that one of its norms is given at most

    def before(self, own: tuple[int, int], shapes: Sequence[tuple[int, int]]) -> float:
        """Bytes of what the model holds before it, of rows of these shapes, of which `own` were
        seen."""
        states = self.states * sum(map(prod, shapes)) / prod(own)
        return states + sum(
            some.size * sum(some.of(*shape) for shape in shapes) / some.of(*own)
            for some in self.given
        )


@dataclass(frozen=True)
class Chunk:
    """Rows that go through a block together."""

    tokens: int
    width: int  # of the states
    itemsize: int
    is_padded: bool
    sources: int

    def most(
        self, blocks: Sequence[Seen], own: tuple[int, int], shapes: Sequence[tuple[int, int]]
    ) -> float:
        """The most that there is at once of all chunks, whose shapes these are, with this one on
        its way: while each block is solved, and while the last rows go through it to the next."""
        there = [PATHS * block.before(own, shapes) for block in blocks]
        solved = map(self._solved, blocks)
        running = (block.size + block.working for block in blocks)
        return max(*map(add, there, solved), *map(add, there[1:], running))

    def _solved(self, block: Seen) -> int:
        """The most that there is at once as a block is solved."""
        of_a_norm = block.normed * (NORM[0] * self.itemsize + NORM[1] * 4)
        return block.size + max(of_a_norm, *map(self._of_group, block.groups), 0)

    def _of_group(self, group: Group) -> int:
        """Its sums, and beside them the inputs in the merge and a run in the source, or copies, or
        what is solved. A layer that adds to the stream (told by its width here) is run as far as
        the stream's next reader, twice: without its output, and in the source."""
        n, outputs = group.inputs, group.outputs
        sums = KINDS * 4 * sum(n * n + m * n for m in outputs)
        adds = outputs == [self.width]
        there = n + self.width if adds else n
        running = (group.reaching if adds else group.working) + self.tokens * self.itemsize * there
        part = n * min(max(1, objective.PART // n), max(outputs))
        return sums + max(running, self._of_copies(group), 4 * part * (self.sources + MADE))

    def _of_copies(self, group: Group) -> int:
        """Inputs of merge and source and outputs, and the copies of them that the sums are of."""
        kept = self.itemsize * (2 * group.inputs + sum(group.outputs))
        each = self.itemsize * self.is_padded + 4 * (self.itemsize < 4)
        return self.tokens * (kept + each * (group.inputs + max(group.outputs)))


class _Watch:
    """Sees the blocks of a pass."""

    def __init__(self, live: Live):
        self._seen: list[tuple[Seen, set[int]]] = []  # with the storages that were there before
        self._live, self._start, self._input = live, 0, None
        # What blocks are given beside the states, and a tensor's shape.
        self._given: dict[int, tuple[torch.UntypedStorage, tuple[int, ...]]] = {}

    def blocks(self, rows: int, length: int) -> list[Seen]:
        """Those of a pass of such rows."""
        given = {
            key: Given(storage.nbytes(), shape[0] == rows, shape.count(length))
            for key, (storage, shape) in self._given.items()
        }
        for block, there in self._seen:
            block.given = tuple(some for key, some in given.items() if key in there)
            block.states -= sum(some.size for some in block.given)
        return [block for block, _ in self._seen]

    def before(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = (t for t in tensors((args[1:], kwargs)) if t.dim())
        self._given |= {storage_of(t): (t.untyped_storage(), tuple(t.shape)) for t in given}
        found = Seen(sum(p.nbytes for p in block.parameters()), self._live.now)
        self._seen.append((found, self._live.storages()))
        self._live.most = self._start = self._live.now

    def after(self, block: nn.Module, args: tuple, output: Any) -> None:
        self._reach()
        self._last.working, self._input = self._most, None

    def before_layer(self, layer: nn.Module, args: tuple) -> None:
        if not isinstance(layer, nn.Linear | Conv1D):  # a norm, which ends a group
            self._reach()
            self._input, block = None, self._last
            if args[0].is_floating_point():
                block.normed = max(block.normed, args[0].numel())
            return
        rows, columns = layer.weight.shape
        inputs, outputs = (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)
        if args[0] is not self._input:
            self._reach()
            self._last.groups.append(Group(inputs))
            self._input = args[0]
        self._last.groups[-1].outputs.append(outputs)

    def after_layer(self, layer: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(layer, nn.Linear | Conv1D):
            self._last.groups[-1].working = self._most

    def _reach(self) -> None:
        """Keep what was there until the next group began."""
        if self._input is not None:
            self._last.groups[-1].reaching = self._most

    @property
    def _last(self) -> Seen:
        return self._seen[-1][0]

    @property
    def _most(self) -> int:
        """Bytes of what was there at once since the block began."""
        return self._live.most - self._start


def _pass(model: nn.Module, solved: Collection[str], shape: tuple[int, int]) -> list[Seen]:
    with Live() as live, torch.no_grad():
        watch = _Watch(live)
        for _, block in blocks_of(model):
            block.register_forward_pre_hook(watch.before, with_kwargs=True)
            block.register_forward_hook(watch.after)
        for path, layer in model.named_modules():
            if path in solved:
                layer.register_forward_pre_hook(watch.before_layer)
                layer.register_forward_hook(watch.after_layer)
        model(input_ids=torch.zeros(shape, dtype=torch.long), use_cache=False)
    return watch.blocks(*shape)


def _estimate(config: PretrainedConfig, itemsize: int, tokens: int) -> list[Seen]:
    """Like a Llama of the config's sizes."""
    text = config.get_text_config()
    width, vocabulary = text.hidden_size, text.vocab_size
    inner = inner_width(text)
    states, inside, logits = (itemsize * tokens * n for n in (2 * width, 3 * inner, vocabulary))
    layer = Seen(itemsize * width * (4 * width + 3 * inner), states, working=inside)
    layer.groups.append(Group(width, [inner, inner], inside, inside))
    layer.groups.append(Group(inner, [width], inside, inside))
    head = Seen(itemsize * width * vocabulary, states, working=logits)
    head.groups.append(Group(width, [vocabulary], logits, logits))
    return [layer, head]
