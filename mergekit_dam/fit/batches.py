"""Which rows are computed together, so that little padding is computed."""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mergekit_dam.data import Row, SourceData

PADDING = 0.05  # at most this share of the positions that are computed together
WINDOW = 50  # batches whose rows are sorted by length; between them the order is random


class StepRows(torch.utils.data.Dataset):
    """One item holds one row of every source, given by their numbers: see `ByLength`."""

    def __init__(self, sources: Sequence[SourceData]):
        self._rows = [source.train for source in sources]
        self.lengths = [[len(row) for row in rows] for rows in self._rows]

    def __len__(self) -> int:
        return max(map(len, self._rows))

    def __getitem__(self, numbers: Sequence[int]) -> list[Row]:
        return [rows[number] for rows, number in zip(self._rows, numbers, strict=True)]

    def row(self, source: int, number: int) -> Row:
        return self._rows[source][number]


class ByLength(torch.utils.data.Sampler):
    """A random order in which a step's rows of one source are about equally long, and long rows of
    one source come with long ones of the others.

    An item is one row number for each source. The order is that of its seed and epoch alone. The
    last step of an epoch is filled up with rows from its beginning.
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],  # of each source's rows
        step: int,  # items of all processes
        seed: int,
    ):
        self._lengths, self._step, self._seed, self._epoch = lengths, step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        """Of the source with the most rows; shorter ones begin again."""
        return -(-max(map(len, self._lengths)) // self._step) * self._step

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        chance = random.Random(f"{self._seed} {self._epoch}")
        columns = [self._column(lengths, chance) for lengths in self._lengths]
        fewest = min(map(len, self._lengths))  # a row comes once in a window
        window = max(1, min(WINDOW, fewest // self._step)) * self._step
        for start in range(0, len(self), window):
            chosen = [column[start : start + window] for column in columns]
            yield from self._steps(chosen, chance)

    def _column(self, lengths: Sequence[int], chance: random.Random) -> list[int]:
        order = list(range(len(lengths)))
        chance.shuffle(order)
        return [order[index % len(order)] for index in range(len(self))]

    def _steps(self, chosen: list[list[int]], chance: random.Random) -> Iterator[tuple[int, ...]]:
        by_length = [
            sorted(column, key=lengths.__getitem__)
            for column, lengths in zip(chosen, self._lengths, strict=True)
        ]
        items = list(zip(*by_length, strict=True))
        steps = [items[i : i + self._step] for i in range(0, len(items), self._step)]
        chance.shuffle(steps)
        for step in steps:
            yield from step


def collate(items: Sequence[Sequence[Row]]) -> dict[str, Tensor]:
    """A step's batch, source after source: see `batch`."""
    rows = [(number, row) for number in range(len(items[0])) for row in (i[number] for i in items)]
    return batch([row for _, row in rows], [number for number, _ in rows])


def batch(rows: Sequence[Row], sources: Sequence[int]) -> dict[str, Tensor]:
    """input_ids [rows, longest], padded on the right; lengths, starts and sources [rows]."""
    tensors = [torch.tensor(row.ids) for row in rows]
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True),
        "lengths": torch.tensor([len(row) for row in rows]),
        "starts": torch.tensor([row.start for row in rows]),
        "sources": torch.tensor(sources),
    }


def groups(lengths: Sequence[int]) -> list[list[int]]:
    """Rows that go through the model together: few groups, each with little padding. Longest rows
    first."""
    result: list[list[int]] = []
    longest = total = 0  # tokens of the last group's first row, and of all its rows
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        total += lengths[row]
        if result and 1 - total / (longest * (len(result[-1]) + 1)) <= PADDING:
            result[-1].append(row)
        else:
            result.append([row])
            longest = total = lengths[row]
    return result
