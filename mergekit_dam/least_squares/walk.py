"""The least-squares start: coefficients with which every layer of the merge, given what the
merged layers before it really produce, comes nearest to the outputs of the sources' own layers.

Layers are solved in the order in which a block calls them. What adds to a residual stream is
asked to bring the whole stream, not its own part alone, to where the source has it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.data import Row
from mergekit_dam.least_squares.layers import (
    Call,
    Layer,
    adds_to,
    arriving,
    calls,
    in_order,
    layers,
)
from mergekit_dam.least_squares.objective import LayerObjective
from mergekit_dam.least_squares.problem import Problem
from mergekit_dam.least_squares.rows import chunks, split
from mergekit_dam.least_squares.solve import solve
from mergekit_dam.model import Block, MergedModel, Path

RIDGES = (1.0, 0.1, 1e-2, 1e-3)  # of a tensor's mean second derivative
TOLERANCE = 1e-2  # of a residual: a hundredth of that takes twice the products for the same merge

BlockWeights = Mapping[str, Tensor]  # by their names in the block


@dataclass(frozen=True)
class Pair:
    """The same rows in the merge and in their source."""

    number: int  # the source's
    merge: Path
    source: Path
    real: Tensor  # [rows, length], False at padding
    is_check: bool  # whether the rows choose the ridge rather than the coefficients
    share: float  # what a token counts: one over its source's tokens


@dataclass(frozen=True)
class Group:
    """Layers of a block that see the same input."""

    block: Block
    layers: list[Layer]
    point: Layer | None  # what reads the stream next; None: the block's end
    adds: bool  # whether the only layer's output is added to that stream

    def add(
        self,
        pair: Pair,
        own: BlockWeights,
        theirs: BlockWeights,
        objectives: Mapping[Layer, tuple[LayerObjective, LayerObjective]],
    ) -> list[Layer]:
        """Add some rows to the objectives; the layers whose tokens cannot be told apart."""
        inputs = calls(self.block, own, self.layers, pair.merge.arrival, outputs=False)
        wanted = self._wanted(pair, own, theirs)
        return [
            layer
            for layer, objective in objectives.items()
            if not layer.add(
                objective[pair.is_check],
                inputs[layer.path],
                wanted[layer.path],
                pair.real,
                layer.own(own),
                layer.own(theirs),
                pair.share,
            )
        ]

    def _wanted(self, pair: Pair, own: BlockWeights, theirs: BlockWeights) -> dict[str, Call]:
        """The layers' calls in the source; or the output that brings the whole stream to where the
        source has it."""
        if not self.adds:
            return calls(self.block, theirs, self.layers, pair.source.arrival)
        rest = arriving(self.block, own, self.point, pair.merge.arrival, without=self.layers[0])
        stream = arriving(self.block, theirs, self.point, pair.source.arrival)
        return {self.layers[0].path: Call((), {}, stream - rest)}


def least_squares(
    merged: MergedModel,
    rows: Sequence[Sequence[Row]],  # of each source
    *,
    solved: Iterable[str] = (),  # output tensors that have their coefficients already
    report: Callable[[set[str]], None] = lambda solved: None,
) -> None:
    """Set the trained coefficients of a merged model, starting from those that it has.

    `report` is called after each block, with all output tensors solved so far. Deterministic;
    memory is that of one block's weights in every source, the rows' hidden states, and a matrix
    [in, in] for each layer that is being solved.
    """
    walk = _Walk(merged, list(_pairs(merged, rows)), set(solved))
    head = merged.model.get_output_embeddings()
    with torch.no_grad(), merged.abreast(walk.paths()):
        while (arrival := walk.pairs[0].merge.arrival) is not None:
            sources = [arrival.block.weights(s) for s in range(len(rows))]
            walk.solve(arrival.block, sources)
            report(walk.solved)
            if arrival.block is head:
                return
            walk.go_on(arrival.block, sources)
            del sources  # before those of the next block come


class _Walk:
    def __init__(self, merged: MergedModel, pairs: list[Pair], solved: set[str]):
        self.pairs, self.solved = pairs, solved
        self._merged = merged
        self._trained = merged.trained_coefficients().keys()

    def paths(self) -> list[Path]:
        return [path for pair in self.pairs for path in (pair.merge, pair.source)]

    def go_on(self, block: Block, sources: Sequence[BlockWeights]) -> None:
        """Run a block for every path, and let it go on to the next."""
        own = block.weights("merge")
        for pair in self.pairs:
            for path, weights in ((pair.merge, own), (pair.source, sources[pair.number])):
                arrival = path.arrival
                path.go_on(block.run_with(weights, *arrival.args, **arrival.kwargs))

    def solve(self, block: Block, sources: Sequence[BlockWeights]) -> None:
        """Set the coefficients of a block's layers that have none yet."""
        found = [
            layer
            for layer in layers(block, self._trained)
            if not self.solved.intersection(layer.tensors)
        ]
        if not found:
            return
        few = min(self.pairs, key=lambda pair: pair.real.numel()).merge.arrival
        groups = list(in_order(block, block.weights("merge"), found, few))
        for members, following in zip(groups, [*groups[1:], None], strict=True):
            own = block.weights("merge")
            point = following[0] if following else None
            adds = len(members) == 1 and adds_to(block, own, members[0], point, few)
            self._solve(Group(block, members, point, adds), own, sources)
            del own  # before it is made again

    def _solve(self, group: Group, own: BlockWeights, sources: Sequence[BlockWeights]) -> None:
        """Set the coefficients of a group. Its sums are freed when this returns."""
        for layer, fit, check in self._objectives(group, own, sources):
            self._set(layer, fit, check)
            self.solved.update(layer.tensors)

    def _objectives(
        self, group: Group, own: BlockWeights, sources: Sequence[BlockWeights]
    ) -> list[tuple[Layer, LayerObjective, LayerObjective]]:
        """Each layer with its objective on the two kinds of rows."""
        found = {layer: (layer.objective(), layer.objective()) for layer in group.layers}
        for pair in self.pairs:
            for layer in group.add(pair, own, sources[pair.number], found):
                del found[layer]
        return [(layer, *objectives) for layer, objectives in found.items()]

    def _set(self, layer: Layer, fit: LayerObjective, check: LayerObjective) -> None:
        """The coefficients with the ridge that does best on rows that they have not seen."""
        stacks = {name: self._merged.stack(name) for name in layer.tensors}
        rows = {name: list(stack.rows) for name, stack in stacks.items()}
        parameters = self._merged.coefficients()
        start = {name: parameters[name][rows[name]] for name in stacks}
        inputs = {name: stack.load() for name, stack in stacks.items()}
        problem, unseen = Problem(fit, inputs), Problem(check, inputs).beside(start)
        best, found, lowest = start, start, 0.0
        for ridge in RIDGES:
            found = solve(problem, start, ridge, first=found, tolerance=TOLERANCE)
            if (value := unseen(found)) < lowest:
                best, lowest = found, value
        for name, coefficient in best.items():
            parameters[name].data[rows[name]] = coefficient


def _pairs(merged: MergedModel, rows: Sequence[Sequence[Row]]) -> Iterator[Pair]:
    for source, own in enumerate(rows):
        for is_check, part in enumerate(split(own)):
            share = 1 / sum(map(len, part))
            for chunk in chunks(part, merged.vocabulary):
                yield _pair(merged, chunk, source, bool(is_check), share)


def _pair(merged: MergedModel, chunk: Sequence[Row], source: int, is_check: bool, share) -> Pair:
    tensors = [torch.tensor(row.ids) for row in chunk]
    ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(merged.device)
    lengths = torch.tensor([len(row) for row in chunk], device=ids.device)
    real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    paths = (Path(merged, ids, view) for view in ("merge", source))
    return Pair(source, *paths, real, is_check, share)
