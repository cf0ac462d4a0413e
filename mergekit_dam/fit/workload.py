"""What a fit computes, from the lengths of its rows."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from mergekit_dam.config import Settings
from mergekit_dam.fit.batches import ByLength, groups

FORESEEN = 50_000  # items of a fit, or those of one pass, that are gone through: a quarter second


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
    passes: int  # forward and backward, of one process
    tokens: int  # of all passes

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
    fit goes on as its first `FORESEEN` items do."""
    some = max(1, FORESEEN // settings.batch_size) * settings.batch_size
    items = islice(items_of_a_fit(lengths, settings, processes), some)
    nothing = [Group(0, (0,) * len(lengths))]
    candidates = [nothing, nothing]
    widest, seen, tokens, most = 0, 0, 0, 1
    while own := list(islice(items, settings.batch_size)):
        found = list(_computed(own, lengths))
        candidates = [
            max(c, found, key=k) for c, k in zip(candidates, (_total, _pairs), strict=True)
        ]
        most, widest = max(most, len(found)), max(widest, *_of_sources(found))
        seen, tokens = seen + 1, tokens + _total(found)
    if alone > _total(candidates[0]):
        candidates = [[Group(alone, (alone, *nothing[0].tokens[1:]))]]
    if most > 1:
        candidates = [with_an_empty_one(groups) for groups in candidates]
    passes = passes_of_a_fit(lengths, settings, processes)[1]
    return Workload(
        candidates=tuple(dict.fromkeys(map(tuple, candidates))),
        rows=settings.batch_size * len(lengths),
        alone=alone or candidates[0][0].length,
        widest=max(widest, alone),
        passes=passes,
        tokens=tokens * passes // max(1, seen),
    )


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
    of_an_epoch, passes = passes_of_a_fit(lengths, settings, processes)
    for epoch in range(math.ceil(passes / of_an_epoch)):
        order.set_epoch(epoch)
        left = passes - epoch * of_an_epoch
        yield from islice(order, min(left, of_an_epoch) * step)


def passes_of_a_fit(
    lengths: Sequence[Sequence[int]], settings: Settings, processes: int = 1
) -> tuple[int, int]:
    """Of an epoch and of all steps, for each process. An epoch's last step adds up what is left."""
    of_an_epoch = math.ceil(max(map(len, lengths)) / (settings.batch_size * processes))
    updates = math.ceil(of_an_epoch / settings.accumulation)
    steps = settings.max_steps
    if steps < 0:
        steps = math.ceil((settings.epochs or 1) * updates)
    epochs, more = divmod(steps, updates)
    return of_an_epoch, epochs * of_an_epoch + min(more * settings.accumulation, of_an_epoch)


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
