"""What the least-squares start keeps in memory, found by a pass of its largest chunk of rows
through the model on tensors without storage."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from mergekit_dam.data import Row
from mergekit_dam.least_squares import objective
from mergekit_dam.least_squares.rows import chunks, split
from mergekit_dam.model import Skeleton
from mergekit_dam.model.live import Live, tensors
from mergekit_dam.model.skeleton import blocks_of, make_model
from mergekit_dam.model.storageless import inner_width, tell_estimated, without_storage

PATHS = 2  # of each chunk: the merge's and the source's
VECTORS = 8  # of conjugate gradients
KINDS = 2  # of rows, each with sums of its own
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
) -> StartNeeds:
    text = config.get_text_config()
    found = [c for own in rows for part in split(own) for c in chunks(part, text.vocab_size)]
    largest = max(found, key=_positions)
    shape = (len(largest), len(largest[0]))
    try:
        with without_storage():
            model = make_model(config, dtype, trust_remote_code=trust_remote_code)
            blocks, masks = _pass(model, _solved(skeleton, trained), shape)
    except Exception as error:  # whatever stops such a run would not stop a real one
        tell_estimated("the start", error)
        blocks, masks = _estimate(config, dtype.itemsize, _positions(largest)), 0
    is_padded = len(largest[-1]) < len(largest[0])
    chunk = Chunk(_positions(largest), text.hidden_size, dtype.itemsize, is_padded, sources)
    of_all = PATHS * sum(map(_positions, found)) / _positions(largest)  # to the largest chunk's
    masks = PATHS * masks * sum(map(_pairs, found)) // _pairs(largest)
    most = max(_peaks(blocks, chunk, of_all, _solving(places, sources)))
    return StartNeeds(int(most) + masks, len(rows) * max(block.size for block in blocks))


def _peaks(
    blocks: Sequence["Seen"], chunk: "Chunk", of_all: float, solving: int
) -> Iterator[float]:
    """While each block is solved, and while the last rows go through it to the next."""
    for block in blocks:
        yield of_all * block.states + chunk.solved(block) + solving
    for block, following in pairwise(blocks):
        yield of_all * following.states + block.size + block.working


def _solving(places: int, sources: int) -> int:
    """Second derivatives of the coefficients at each place, in float32 and float64, their factors
    in float64, and what conjugate gradients go along with."""
    return places * (20 * sources**2 + 4 * VECTORS * sources)


def _positions(chunk: Sequence[Row]) -> int:
    return len(chunk) * len(chunk[0])


def _pairs(chunk: Sequence[Row]) -> int:
    """Of positions in a row, for which a mask has a number each."""
    return _positions(chunk) * len(chunk[0])


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


@dataclass
class Seen:
    """A block, as a pass has seen it."""

    size: int  # bytes of its weights
    states: int = 0  # bytes of what the model holds before it, but for masks
    working: int = 0  # bytes of what else is there at once as it runs
    groups: list[Group] = field(default_factory=list)  # of layers that are solved


@dataclass(frozen=True)
class Chunk:
    """Rows that go through a block together."""

    tokens: int
    width: int  # of the states
    itemsize: int
    is_padded: bool
    sources: int

    def solved(self, block: Seen) -> int:
        """The most that there is at once as a block is solved."""
        return block.size + max(map(self._of_group, block.groups), default=0)

    def _of_group(self, group: Group) -> int:
        """Its sums, and beside them the inputs in the merge and a run in the source, or copies, or
        what is solved. What adds to the stream is run up to what reads that, for the rest of it,
        and then for the whole."""
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
        self.seen: list[Seen] = []
        self._live, self._start, self._input = live, 0, None
        self._beside: dict[Any, int] = {}  # storage -> its bytes

    @property
    def masks(self) -> int:
        """Bytes of what all blocks are given beside the states."""
        return sum(self._beside.values())

    def before(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        storages = (tensor.untyped_storage() for tensor in tensors((args[1:], kwargs)))
        self._beside |= {storage: storage.nbytes() for storage in storages}
        states = max(0, self._live.now - self.masks)
        self.seen.append(Seen(sum(p.nbytes for p in block.parameters()), states))
        self._live.most = self._start = self._live.now

    def after(self, block: nn.Module, args: tuple, output: Any) -> None:
        self._reach()
        self.seen[-1].working, self._input = self._most, None

    def before_layer(self, layer: nn.Module, args: tuple) -> None:
        if not isinstance(layer, nn.Linear | Conv1D):  # a norm: small, but it ends a group
            self._reach()
            self._input = None
            return
        rows, columns = layer.weight.shape
        inputs, outputs = (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)
        if args[0] is not self._input:
            self._reach()
            self.seen[-1].groups.append(Group(inputs))
            self._input = args[0]
        self.seen[-1].groups[-1].outputs.append(outputs)

    def after_layer(self, layer: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(layer, nn.Linear | Conv1D):
            self.seen[-1].groups[-1].working = self._most

    def _reach(self) -> None:
        """The end of the present group's way."""
        if self._input is not None:
            self.seen[-1].groups[-1].reaching = self._most

    @property
    def _most(self) -> int:
        """Bytes of what was there at once since the block began."""
        return self._live.most - self._start


def _pass(
    model: nn.Module, solved: Collection[str], shape: tuple[int, int]
) -> tuple[list[Seen], int]:
    """The blocks, in the order in which rows go through them, and the bytes of masks and the like
    that they are given."""
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
    return watch.seen, watch.masks


def _estimate(config: PretrainedConfig, itemsize: int, tokens: int) -> list[Seen]:
    """Like a Llama of the config's sizes."""
    text = config.get_text_config()
    width, vocabulary = text.hidden_size, text.vocab_size
    inner = inner_width(text)
    states, inside, logits = (itemsize * tokens * n for n in (2 * width, 3 * inner, vocabulary))
    layer = Seen(itemsize * width * (4 * width + 3 * inner), states, inside)
    layer.groups.append(Group(width, [inner, inner], inside, inside))
    layer.groups.append(Group(inner, [width], inside, inside))
    head = Seen(itemsize * width * vocabulary, states, logits)
    head.groups.append(Group(width, [vocabulary], logits, logits))
    return [layer, head]
