"""What a fit computes, from the lengths of its rows."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from mergekit_dam.config import Settings
from mergekit_dam.fit.batches import ByLength, groups

FORESEEN = 50_000  # items of a fit, or those of one pass, that are gone through, in a second


@dataclass(frozen=True)
class Group:
    """Rows that go through the model together."""

    length: int  # of the longest
    tokens: tuple[int, ...]  # of each source, with the padding that is computed beside them


@dataclass(frozen=True)
class Workload:
    """Tokens count with the padding that is computed beside them."""

    # Passes that may take most memory, that of most tokens first; of each its groups, the longest
    # rows first. If a pass has one group and others have several, an empty one follows: then
    # gradients of weights wait between groups.
    candidates: tuple[tuple[Group, ...], ...]
    rows: int  # of a pass
    alone: int  # tokens of a row that is evaluated
    widest: int  # tokens of one source in a pass
    steps: int  # 0 where it is unknown how many
    passes: int  # of one process
    tokens: int  # of all passes
    together: frozenset[int]  # tokens of each group, of all sources; what comes often counts once
    taught: frozenset[int]  # of each source

    @property
    def largest(self) -> tuple[int, ...]:
        """Tokens of each source in the pass that computes most."""
        return _of_sources(self.candidates[0])

    @property
    def lengths(self) -> set[int]:
        """Of all rows whose memory counts."""
        return {self.alone, *(g.length for groups in self.candidates for g in groups)}


def workload(
    lengths: Sequence[Sequence[int]], settings: Settings, processes: int = 1, *, alone: int = 0
) -> Workload:
    """Of rows of these lengths, for each source; a row of `alone` tokens is evaluated, too. A long
    fit goes on as its first `FORESEEN` items do, but has a pass of the longest rows."""
    rows, extent = settings.batch_size, extent_of_a_fit(lengths, settings, processes)
    items = items_of_a_fit(lengths, settings, processes)
    some = islice(items, max(1, FORESEEN // rows) * rows)
    found = [list(_computed(own, lengths)) for own in iter(lambda: list(islice(some, rows)), [])]
    tokens = sum(map(_total, found)) * extent.passes // max(1, len(found))
    if len(found) < extent.passes * processes:
        found.append(list(_computed(_longest(lengths, rows, processes), lengths)))
    nothing = [Group(0, (0,) * len(lengths))]
    candidates = [max(found, key=size, default=nothing) for size in (_total, _pairs)]
    if alone > _total(candidates[0]):
        candidates = [[Group(alone, (alone, *nothing[0].tokens[1:]))]]
    if any(len(groups) > 1 for groups in found):
        candidates = [with_an_empty_one(groups) for groups in candidates]
    return Workload(
        candidates=tuple(dict.fromkeys(map(tuple, candidates))),
        rows=rows * len(lengths),
        alone=alone or candidates[0][0].length,
        widest=max(alone, *(max(_of_sources(groups)) for groups in (nothing, *found))),
        steps=extent.steps,
        passes=extent.passes,
        tokens=tokens,
        together=frozenset(sum(group.tokens) for groups in found for group in groups),
        taught=frozenset(own for groups in found for group in groups for own in group.tokens),
    )


def _longest(lengths: Sequence[Sequence[int]], count: int, processes: int) -> list[tuple[int, ...]]:
    """Items of so many of each source's longest rows, as often as a step may have each."""
    orders = [sorted(range(len(own)), key=own.__getitem__, reverse=True) for own in lengths]
    often = [-(-count * processes // len(own)) for own in lengths]
    return [tuple(o[n // k] for o, k in zip(orders, often, strict=True)) for n in range(count)]


def with_an_empty_one(groups: Sequence[Group]) -> list[Group]:
    """Two groups at least."""
    first = groups[0]
    return [*groups, Group(first.length, (0,) * len(first.tokens))][: max(2, len(groups))]


def _total(groups: Sequence[Group]) -> int:
    return sum(_of_sources(groups))


def _pairs(groups: Sequence[Group]) -> int:
    """Of tokens in a row, which some models keep."""
    return sum(group.length * sum(group.tokens) for group in groups)


def _of_sources(groups: Sequence[Group]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*(group.tokens for group in groups), strict=True)))


def items_of_a_fit(
    lengths: Sequence[Sequence[int]], settings: Settings, processes: int = 1
) -> Iterator[tuple[int, ...]]:
    """What `ByLength` gives to all the steps of a fit; each pass of a process takes `batch_size`
    of them."""
    step = settings.batch_size * processes
    order = ByLength(lengths, step, settings.seed)
    extent = extent_of_a_fit(lengths, settings, processes)
    for epoch in range(math.ceil(extent.passes / extent.epoch)):
        order.set_epoch(epoch)
        left = extent.passes - epoch * extent.epoch
        yield from islice(order, min(left, extent.epoch) * step)


class Extent(NamedTuple):
    """How long a fit is."""

    epoch: int  # passes of an epoch, forward and backward, of each process
    passes: int  # of all steps
    steps: int


def extent_of_a_fit(
    lengths: Sequence[Sequence[int]], settings: Settings, processes: int = 1
) -> Extent:
    """An epoch's last step adds up the passes that are left."""
    epoch = math.ceil(max(map(len, lengths)) / (settings.batch_size * processes))
    updates = math.ceil(epoch / settings.accumulation)
    steps = settings.max_steps
    if steps < 0:
        steps = math.ceil((settings.epochs or 1) * updates)
    epochs, more = divmod(steps, updates)
    return Extent(epoch, epochs * epoch + min(more * settings.accumulation, epoch), steps)


def _computed(
    items: Sequence[tuple[int, ...]], lengths: Sequence[Sequence[int]]
) -> Iterator[Group]:
    """The groups of rows that some items have."""
    owners = [source for item in items for source in range(len(item))]
    own = [lengths[source][number] for item in items for source, number in enumerate(item)]
    for group in groups(own):
        longest, totals = own[group[0]], [0] * len(lengths)
        for row in group:
            totals[owners[row]] += longest
        yield Group(longest, tuple(totals))
