"""A row as the model reads it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """The token ids of one text."""

    ids: list[int]
    start: int = 0  # first position whose next token counts; those before predict a prompt
    is_cut: bool = False  # whether the text is longer

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def counted(self) -> int:
        """Positions that count: the last token predicts nothing."""
        return max(len(self) - 1 - self.start, 0)


def together(rows: Iterable[Row], positions: int, count: int | None = None) -> Iterator[list[Row]]:
    """Rows of similar length, the longest first; so many positions, padding among them, and so
    many rows at a time at most, but a row at least."""
    ordered, start = sorted(rows, key=len, reverse=True), 0
    while start < len(ordered):
        end = start + min(max(1, positions // len(ordered[start])), count or len(ordered))
        yield ordered[start:end]
        start = end
