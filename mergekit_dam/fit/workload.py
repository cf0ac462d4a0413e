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
    widest: int  # tokens of one source in a pass
    longest: int  # tokens of a row
    groups: int  # how many groups of rows about equally long a pass has, at most
    passes: int  # forward and backward, of one process
    tokens: int  # of all passes


def workload(
    lengths: Sequence[Sequence[int]], settings: Settings, processes: int = 1, *, alone: int = 0
) -> Workload:
    """Of rows of these lengths, for each source; a row of `alone` tokens is evaluated, too."""
    items = items_of_a_fit(lengths, settings, processes)
    largest, widest, passes, tokens, most = (0,) * len(lengths), 0, 0, 0, 1
    while together := list(islice(items, settings.batch_size)):
        own, count = _computed(together, lengths)
        most = max(most, count)
        largest, widest = max(largest, own, key=sum), max(widest, *own)
        passes, tokens = passes + 1, tokens + sum(own)
    if alone > sum(largest):
        largest = (alone, *[0] * (len(lengths) - 1))
    widest, longest = max(widest, alone), max(alone, *map(max, lengths))
    return Workload(largest, widest, longest, most, -(-passes // processes), tokens // processes)


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
) -> tuple[tuple[int, ...], int]:
    """Tokens of each source that go through the model for some items, and in how many groups."""
    owners = [source for item in items for source in range(len(item))]
    own = [lengths[source][number] for item in items for source, number in enumerate(item)]
    totals, found = [0] * len(lengths), groups(own)
    for together in found:
        for row in together:
            totals[owners[row]] += own[together[0]]
    return tuple(totals), len(found)
