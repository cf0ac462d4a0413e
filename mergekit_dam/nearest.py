"""What a misspelt word may have been meant to be."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: object, known: Iterable[object], otherwise: str = "") -> str:
    """The end of a sentence: the nearest of the known words, or else `otherwise`."""
    nearest = difflib.get_close_matches(str(word), list(map(str, known)), n=1, cutoff=0.5)
    return f", did you mean `{nearest[0]}`?" if nearest else otherwise
