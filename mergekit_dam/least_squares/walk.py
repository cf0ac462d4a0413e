"""The least-squares start: every layer's coefficients such that the merge's own input gives the
sources' outputs, layer after layer, each seeing what the merged layers before it really produce.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.data import Row
from mergekit_dam.least_squares.layers import Layer, calls, in_order, layers
from mergekit_dam.least_squares.objective import LayerObjective
from mergekit_dam.least_squares.paths import Path, abreast
from mergekit_dam.least_squares.solve import Coefficients, Problem, solve
from mergekit_dam.model import Block, MergedModel

RIDGES = (1e-2, 1e-3, 1e-4)  # of a layer's own second derivatives
CHECKED = 0.2  # share of the rows by which the ridge is chosen
CHUNK = 4096  # tokens of a forward pass


@dataclass
class Pair:
    """The same rows in the merge and in their source."""

    merge: Path
    source: Path
    real: Tensor  # [rows, length]
    is_check: bool


def least_squares(
    merged: MergedModel,
    rows: Sequence[Sequence[Row]],  # of each source
    *,
    report: Callable[[str], None] = lambda path: None,
) -> None:
    """Set the trained coefficients of a merged model, from those that it has.

    `report` is called with the name of each block that is done.
    """
    trained = merged.trained_coefficients()
    pairs = list(_pairs(merged, rows))
    tokens = [
        [sum(int(p.real.sum()) for p in pairs if p.merge.source == i and p.is_check == c) for c in (False, True)]
        for i in range(len(rows))
    ]
    head = merged.model.get_output_embeddings()
    solved: set[str] = set()
    with torch.no_grad(), abreast(merged, [path for p in pairs for path in (p.merge, p.source)]):
        while (arrival := pairs[0].merge.arrival) is not None:
            block = arrival.block
            sources = {s: merged.block_weights(block, s) for s in range(len(rows))}
            _solve_block(merged, block, pairs, sources, trained, solved, tokens)
            report(block.path)
            if block is head:
                return
            own = merged.block_weights(block, "merge")
            for pair in pairs:
                for path, weights in ((pair.merge, own), (pair.source, sources[pair.source.source])):
                    arrival = path.arrival
                    path.go_on(block.run_with(weights, *arrival.args, **arrival.kwargs))


def _solve_block(merged, block, pairs, sources, trained, solved, tokens):
    found = [l for l in layers(block, trained) if not solved.intersection(l.tensors)]
    if not found:
        return
    groups = list(in_order(block, merged.block_weights(block, "merge"), found, pairs[0].merge.arrival))
    for group in groups:
        own = merged.block_weights(block, "merge")
        objectives = {l.path: (l.objective(), l.objective()) for l in group}
        usable = {l.path: True for l in group}
        for pair in pairs:
            i = pair.merge.source
            m = calls(block, own, group, pair.merge.arrival)
            s = calls(block, sources[i], group, pair.source.arrival)
            for l in group:
                usable[l.path] &= l.add(
                    objectives[l.path][pair.is_check], m[l.path], s[l.path], pair.real,
                    _of(own, l), _of(sources[i], l), 1 / max(1, tokens[i][pair.is_check]),
                )
        for l in group:
            if usable[l.path]:
                _solve_layer(merged, l, *objectives[l.path])
                solved.update(l.tensors)


def _of(weights: Mapping[str, Tensor], layer: Layer) -> dict[str, Tensor]:
    prefix = f"{layer.path}." if layer.path else ""
    return {n: weights[prefix + n] for n, _ in layer.module.named_parameters(recurse=False)}


def _solve_layer(merged: MergedModel, layer: Layer, fit: LayerObjective, check: LayerObjective):
    stacks = {name: merged.stack(name) for name in layer.tensors}
    parameters = merged.coefficients()
    start = {n: parameters[n][list(stacks[n].rows)].detach().clone() for n in stacks}
    best, lowest = start, None
    found, problem, checked = None, Problem(fit, stacks), Problem(check, stacks)
    lowest = checked.value(start)
    for ridge in RIDGES:
        found = solve(problem, start, ridge, first=found)
        value = checked.value(found)
        if value < lowest:
            best, lowest = found, value
    for name, c in best.items():
        parameters[name].data[list(stacks[name].rows)] = c


def _pairs(merged: MergedModel, rows: Sequence[Sequence[Row]]) -> Iterator[Pair]:
    for source, own in enumerate(rows):
        count = max(1, round(CHECKED * len(own)))
        for is_check, part in ((True, own[:count]), (False, own[count:])):
            for chunk in _chunks(sorted(part, key=lambda r: len(r.ids), reverse=True)):
                ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r.ids) for r in chunk], batch_first=True)
                lengths = torch.tensor([len(r.ids) for r in chunk])
                real = torch.arange(ids.shape[1]) < lengths[:, None]
                ids, real = ids.to(merged.device), real.to(merged.device)
                yield Pair(Path(merged, ids, source, "merge"), Path(merged, ids, source, source), real, is_check)


def _chunks(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    start = 0
    while start < len(rows):
        size = max(1, CHUNK // len(rows[start].ids))
        yield rows[start : start + size]
        start += size
