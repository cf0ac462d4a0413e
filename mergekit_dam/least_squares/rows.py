"""The calibration rows: what they are for, and how they go through the model."""

from collections.abc import Iterator, Sequence

from mergekit_dam.data import Row

CHECKED = 5  # every fifth row is kept for the choice of the ridge
CHUNK = 4096  # tokens of a forward pass at most
LOGITS = 2**27  # numbers that the head makes in one


def split(rows: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row]]:
    """Those that are solved for, and those that choose the ridge."""
    check = rows[::CHECKED]
    return [row for index, row in enumerate(rows) if index % CHECKED] or check, check


def chunks(rows: Sequence[Row], vocabulary: int) -> Iterator[Sequence[Row]]:
    """Rows of similar length together, the longest at the end; a row that is too long, alone."""
    rows, tokens = sorted(rows, key=len), min(CHUNK, LOGITS // vocabulary)
    end = len(rows)
    while end > 0:
        size = max(1, tokens // len(rows[end - 1]))
        yield rows[max(0, end - size) : end]
        end -= size
