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
from mergekit_dam.least_squares.paths import Path, abreast
from mergekit_dam.least_squares.solve import Problem, solve
from mergekit_dam.model import Block, MergedModel

RIDGES = (1.0, 0.1, 1e-2, 1e-3)  # of a tensor's mean second derivative
CHECKED = 5  # every fifth row is kept for the choice of the ridge
CHUNK = 4096  # tokens of a forward pass

BlockWeights = Mapping[str, Tensor]  # by their names in the block


@dataclass(frozen=True)
class Pair:
    """The same rows in the merge and in their source."""

    merge: Path
    source: Path
    real: Tensor  # [rows, length], False at padding
    is_check: bool  # whether the rows choose the ridge rather than the coefficients
    share: float  # what a token counts: one over its source's tokens

    @property
    def number(self) -> int:
        """The source's."""
        return self.source.source


def least_squares(
    merged: MergedModel,
    rows: Sequence[Sequence[Row]],  # of each source
    *,
    solved: Iterable[str] = (),  # output tensors that have their coefficients already
    report: Callable[[str, set[str]], None] = lambda path, solved: None,
) -> None:
    """Set the trained coefficients of a merged model, starting from those that it has.

    `report` is called with the name of each block that is done and all output tensors solved so
    far. Deterministic; memory is that of one block's weights in every source, the rows' hidden
    states, and a matrix [in, in] for each layer that is being solved.
    """
    walk = _Walk(merged, list(_pairs(merged, rows)), set(solved))
    head = merged.model.get_output_embeddings()
    with torch.no_grad(), abreast(merged, walk.paths()):
        while (arrival := walk.pairs[0].merge.arrival) is not None:
            sources = [merged.block_weights(arrival.block, s) for s in range(len(rows))]
            walk.solve(arrival.block, sources)
            report(arrival.block.path, walk.solved)
            if arrival.block is head:
                return
            walk.go_on(arrival.block, sources)


class _Walk:
    def __init__(self, merged: MergedModel, pairs: list[Pair], solved: set[str]):
        self.pairs, self.solved = pairs, solved
        self._merged = merged
        self._trained = merged.trained_coefficients().keys()

    def paths(self) -> list[Path]:
        return [path for pair in self.pairs for path in (pair.merge, pair.source)]

    def go_on(self, block: Block, sources: Sequence[BlockWeights]) -> None:
        """Run a block for every path, and let it go on to the next."""
        own = self._merged.block_weights(block, "merge")
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
        own = self._merged.block_weights(block, "merge")
        groups = list(in_order(block, own, found, self.pairs[0].merge.arrival))
        for group, following in zip(groups, [*groups[1:], None], strict=True):
            own = self._merged.block_weights(block, "merge")
            point = following[0] if following else None
            for layer, fit, check in self._objectives(block, group, point, own, sources):
                self._set(layer, fit, check)
                self.solved.update(layer.tensors)

    def _objectives(
        self,
        block: Block,
        group: list[Layer],
        point: Layer | None,  # what reads the stream next; None: the block's end
        own: BlockWeights,
        sources: Sequence[BlockWeights],
    ) -> list[tuple[Layer, LayerObjective, LayerObjective]]:
        """Layers that see the same input, each with its objective on the two kinds of rows."""
        found = {layer: (layer.objective(), layer.objective()) for layer in group}
        adds = len(group) == 1 and adds_to(block, own, group[0], point, self.pairs[0].merge.arrival)
        for pair in self.pairs:
            theirs = sources[pair.number]
            merged = calls(block, own, group, pair.merge.arrival)
            source = calls(block, theirs, group, pair.source.arrival)
            if adds:
                rest = arriving(block, own, point, pair.merge.arrival, without=group[0])
                stream = arriving(block, theirs, point, pair.source.arrival)
                source = {group[0].path: Call((), {}, stream - rest)}
            for layer in [layer for layer in group if layer in found]:
                call = (merged[layer.path], source[layer.path], pair.real)
                weights = (layer.own(own), layer.own(theirs))
                if not layer.add(found[layer][pair.is_check], *call, *weights, pair.share):
                    del found[layer]
        return [(layer, *objectives) for layer, objectives in found.items()]

    def _set(self, layer: Layer, fit: LayerObjective, check: LayerObjective) -> None:
        """The coefficients with the ridge that does best on rows that they have not seen."""
        stacks = {name: self._merged.stack(name) for name in layer.tensors}
        rows = {name: list(stack.rows) for name, stack in stacks.items()}
        parameters = self._merged.coefficients()
        start = {name: parameters[name][rows[name]] for name in stacks}
        inputs = {name: stack.load() for name, stack in stacks.items()}
        problem, unseen = Problem(fit, inputs), Problem(check, inputs)
        best, found, lowest = start, start, unseen.value(start)
        for ridge in RIDGES:
            found = solve(problem, start, ridge, first=found)
            if (value := unseen.value(found)) < lowest:
                best, lowest = found, value
        for name, coefficient in best.items():
            parameters[name].data[rows[name]] = coefficient


def _pairs(merged: MergedModel, rows: Sequence[Sequence[Row]]) -> Iterator[Pair]:
    for source, own in enumerate(rows):
        ids = [row.ids for row in own]
        check = ids[::CHECKED]
        fit = [row for index, row in enumerate(ids) if index % CHECKED] or check
        for is_check, part in ((False, fit), (True, check)):
            share = 1 / sum(map(len, part))
            for chunk in _chunks(sorted(part, key=len)):
                yield _pair(merged, chunk, source, is_check, share)


def _pair(merged: MergedModel, chunk: Sequence[list[int]], source: int, is_check, share) -> Pair:
    tensors = [torch.tensor(row) for row in chunk]
    ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(merged.device)
    lengths = torch.tensor([len(row) for row in chunk], device=ids.device)
    real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    paths = (Path(merged, ids, source, "merge"), Path(merged, ids, source, source))
    return Pair(*paths, real, is_check, share)


def _chunks(rows: Sequence[list[int]]) -> Iterator[Sequence[list[int]]]:
    """Rows of similar length together, the longest at the end."""
    end = len(rows)
    while end > 0:
        size = max(1, CHUNK // len(rows[end - 1]))
        yield rows[max(0, end - size) : end]
        end -= size
