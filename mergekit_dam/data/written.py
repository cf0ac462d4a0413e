"""Rows that a source has written itself, in a file that can be looked at and used again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_dam.data.row import Row
from mergekit_dam.errors import DamError
from mergekit_dam.places import whole


@dataclass(frozen=True)
class Written:
    """One text. What the fit reads are the tokens; the text is for people."""

    tokens: list[int]  # ids of the source's own vocabulary, its special tokens included
    prompt: int  # how many of them come before the answer; 0 where there is none
    text: str = ""

    def row(self, ids: Mapping[int, int] | None, length: int, *, on_completion: bool) -> Row:
        """In the merge's vocabulary. `ids` has the merge's token for the source's where they
        differ; the row ends before a token that the merge lacks."""
        tokens = self.tokens
        if ids is not None:
            known = next((n for n, token in enumerate(tokens) if token not in ids), len(tokens))
            tokens = [ids[token] for token in tokens[:known]]
        start = max(self.prompt - 1, 0) if on_completion else 0
        return Row(tokens[:length], start, is_cut=len(tokens) > length)


def save_written(path: Path, rows: Sequence[Written]) -> None:
    """The file appears when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            line = {"text": row.text, "prompt": row.prompt, "tokens": row.tokens}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def load_written(path: Path, vocabulary: int) -> list[Written]:
    """Raises DamError for a file that is damaged, or has tokens beyond the source's vocabulary."""
    try:
        with path.open(encoding="utf-8") as file:
            return [_parse(json.loads(line), vocabulary) for line in file]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamError(
            f"{path}, in which a source's own text was kept, is damaged ({error}): remove it, and "
            "the fit writes it again."
        ) from error


def _parse(line: Mapping, vocabulary: int) -> Written:
    tokens, prompt = line["tokens"], line["prompt"]
    if not isinstance(tokens, list) or not all(
        type(token) is int and 0 <= token < vocabulary for token in tokens
    ):
        raise ValueError(f"`tokens` are not ids below {vocabulary}")
    if type(prompt) is not int or not 0 <= prompt <= len(tokens):
        raise ValueError("`prompt` is no number of tokens")
    return Written(tokens, prompt)
