"""What a fit computes, from the lengths of its rows."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from mergekit_dam.config import Settings
from mergekit_dam.fit.batches import ByLength, groups


@dataclass(frozen=True)
class Workload:
    """Tokens count with the padding that is computed beside them."""

    largest: tuple[int, ...]  # tokens of each source in the pass that computes most
    groups: tuple[int, ...]  # in that pass, of rows about equally long, the longest first; and a 0
    # where it has one group, but others have several, whose gradients wait for each other's
    widest: int  # tokens of one source in a pass
    longest: int  # tokens of a row
    passes: int  # forward and backward, of one process
    tokens: int  # of all passes


def workload(
    lengths: Sequence[Sequence[int]], settings: Settings, processes: int = 1, *, alone: int = 0
) -> Workload:
    """Of rows of these lengths, for each source; a row of `alone` tokens is evaluated, too."""
    items = items_of_a_fit(lengths, settings, processes)
    largest, widest, passes, tokens, most = [[0] * len(lengths)], 0, 0, 0, 1
    while own := list(islice(items, settings.batch_size)):
        found = _computed(own, lengths)
        largest = max(largest, found, key=_total)
        most, widest = max(most, len(found)), max(widest, *_of_sources(found))
        passes, tokens = passes + 1, tokens + _total(found)
    if alone > _total(largest):
        largest = [[alone, *[0] * (len(lengths) - 1)]]
    if len(largest) < min(most, 2):
        largest = [*largest, [0] * len(lengths)]
    return Workload(
        _of_sources(largest),
        tuple(map(sum, largest)),
        max(widest, alone),
        max(alone, *map(max, lengths)),
        -(-passes // processes),
        tokens // processes,
    )


def _total(groups: Sequence[Sequence[int]]) -> int:
    return sum(map(sum, groups))


def _of_sources(groups: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*groups, strict=True)))


def items_of_a_fit(
    lengths: Sequence[Sequence[int]], settings: Settings, processes: int = 1
) -> Iterator[tuple[int, ...]]:
    """What `ByLength` gives to all the steps of a fit; each pass of a process takes `batch_size`
    of them."""
    step = settings.batch_size * processes
    order = ByLength(lengths, step, settings.seed)
    passes = len(order) // step  # of an epoch
    updates = math.ceil(passes / settings.accumulation)
    steps = settings.max_steps
    if steps < 0:
        steps = math.ceil((settings.epochs or 1) * updates)
    for epoch in range(math.ceil(steps / updates)):
        order.set_epoch(epoch)
        left = (steps - epoch * updates) * settings.accumulation
        yield from islice(order, min(left, passes) * step)


def _computed(
    items: Iterable[tuple[int, ...]], lengths: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Of each group of rows that some items have, the tokens of each source that go through the
    model."""
    owners = [source for item in items for source in range(len(item))]
    own = [lengths[source][number] for item in items for source, number in enumerate(item)]
    result = []
    for group in groups(own):
        totals = [0] * len(lengths)
        for row in group:
            totals[owners[row]] += own[group[0]]
        result.append(totals)
    return result
