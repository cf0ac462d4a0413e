"""The calibration rows: what they are for, and how they go through the model."""

from collections.abc import Iterator, Sequence

from mergekit_dam.data import Row, together

CHECKED = 5  # every fifth row is kept for the choice of the ridge
CHUNK = 4096  # tokens of a forward pass at most
LOGITS = 2**27  # numbers that the head makes in one


def split(rows: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row]]:
    """Those that are solved for, and those that choose the ridge."""
    check = rows[::CHECKED]
    return [row for index, row in enumerate(rows) if index % CHECKED] or check, check


def chunks(rows: Sequence[Row], vocabulary: int) -> Iterator[Sequence[Row]]:
    """Those that go through the model together."""
    return together(rows, min(CHUNK, LOGITS // vocabulary))
