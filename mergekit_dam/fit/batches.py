"""Which rows are computed together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_dam.data import Row, SourceData


class StepRows(torch.utils.data.Dataset):
    """One item holds one row of every source; shorter sources begin again."""

    def __init__(self, sources: Sequence[SourceData]):
        self._rows = [source.train for source in sources]

    def __len__(self) -> int:
        return max(map(len, self._rows))

    def __getitem__(self, index: int) -> list[Row]:
        return [rows[index % len(rows)] for rows in self._rows]


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
