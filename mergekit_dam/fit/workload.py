"""What a fit computes, from the lengths of its rows."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from mergekit_dam.config import Settings
from mergekit_dam.fit.batches import ByLength, groups


@dataclass(frozen=True)
class Group:
    """Rows that go through the model together."""

    length: int  # of the longest
    tokens: tuple[int, ...]  # of each source, with the padding that is computed beside them


@dataclass(frozen=True)
class Workload:
    """Tokens count with the padding that is computed beside them."""

    groups: tuple[Group, ...]  # in the pass that computes most, the longest rows first; and an
    # empty one where it has one group, but others have several, whose gradients wait for each
    # other's
    widest: int  # tokens of one source in a pass
    passes: int  # forward and backward, of one process
    tokens: int  # of all passes

    @property
    def largest(self) -> tuple[int, ...]:
        """Tokens of each source in the pass that computes most."""
        return _of_sources(self.groups)


def workload(
    lengths: Sequence[Sequence[int]], settings: Settings, processes: int = 1, *, alone: int = 0
) -> Workload:
    """Of rows of these lengths, for each source; a row of `alone` tokens is evaluated, too."""
    items = items_of_a_fit(lengths, settings, processes)
    nothing = Group(0, (0,) * len(lengths))
    largest, widest, passes, tokens, most = [nothing], 0, 0, 0, 1
    while own := list(islice(items, settings.batch_size)):
        found = list(_computed(own, lengths))
        largest = max(largest, found, key=_total)
        most, widest = max(most, len(found)), max(widest, *_of_sources(found))
        passes, tokens = passes + 1, tokens + _total(found)
    if alone > _total(largest):
        largest = [Group(alone, (alone, *nothing.tokens[1:]))]
    if len(largest) < min(most, 2):
        largest = [*largest, nothing]
    passes, tokens = -(-passes // processes), tokens // processes
    return Workload(tuple(largest), max(widest, alone), passes, tokens)


def _total(groups: Sequence[Group]) -> int:
    return sum(_of_sources(groups))


def _of_sources(groups: Sequence[Group]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*(group.tokens for group in groups), strict=True)))


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
) -> Iterator[Group]:
    """The groups of rows that some items have."""
    owners = [source for item in items for source in range(len(item))]
    own = [lengths[source][number] for item in items for source, number in enumerate(item)]
    for group in groups(own):
        longest, totals = own[group[0]], [0] * len(lengths)
        for row in group:
            totals[owners[row]] += longest
        yield Group(longest, tuple(totals))
