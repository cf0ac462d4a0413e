"""A row as the model reads it."""

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
