"""From an entry of `dam.data` to the rows of a source, for training and held out."""

import hashlib
import json
import reprlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from mergekit_dam.config.data_settings import DataSettings
from mergekit_dam.config.settings import Settings
from mergekit_dam.data.read import read_rows
from mergekit_dam.data.row import Row
from mergekit_dam.data.shapes import example
from mergekit_dam.data.tokens import Reader
from mergekit_dam.errors import DamError


@dataclass(frozen=True)
class SourceData:
    """The rows of one source."""

    train: list[Row]
    held_out: list[Row]

    def digest(self) -> str:
        """Changes when any token does, or what counts."""
        rows = [[(row.ids, row.start) for row in part] for part in (self.train, self.held_out)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def load_rows(
    entry: DataSettings,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,  # of the merge: gives the ids
    source_tokenizer: PreTrainedTokenizerBase,  # of the source: gives the chat template
    limit: int | None = None,  # positions that the model has
) -> SourceData:
    """Read, render, tokenise and split the rows of one source; deterministic for a seed.

    Raises DamError for data that cannot be read or lack the columns.
    """
    held_out = entry.held_out if entry.held_out is not None else settings.held_out
    length = min(entry.max_length or settings.max_length, limit or sys.maxsize)
    loss_on = entry.loss_on or settings.loss_on
    reader = Reader(entry, loss_on, tokenizer, source_tokenizer, length)
    rows = _rows(entry, entry.split, settings, reader)
    if isinstance(held_out, str):
        return _kept_apart(rows, _rows(entry, held_out, settings, reader), entry, held_out)
    return share_out(rows, held_out, entry.path)


def _kept_apart(
    rows: Sequence[Row], held_out: Sequence[Row], entry: DataSettings, split: str
) -> SourceData:
    """Splits may have rows in common, which are held out then."""
    train = others(rows, held_out)
    if not train:
        raise DamError(
            f"All rows of {entry.path} (split {entry.split}) are held out by `held_out: {split}`: "
            f"give the `dam.data` entry of {entry.source} a `split` to train on."
        )
    return SourceData(train=train, held_out=list(held_out))


def share_out(rows: Sequence[Row], share: float, name: str) -> SourceData:
    """The first rows are held out, at least one, and what equals them is not trained on; `name` is
    for the messages."""
    if not rows:
        raise DamError(
            f"{name} has no row in which anything counts: raise `max_length`, or use "
            "`loss_on: all`."
        )
    if len(rows) == 1:
        raise DamError(
            f"{name} has one row only in which anything counts: the held-out share needs another; "
            "add rows, raise `max_length`, or use `loss_on: all`."
        )
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    train = others(rows[count:], rows[:count])
    if not train:
        raise DamError(
            f"{name} has no row that differs from those held out, within `max_length`: add other "
            "rows, or lower `held_out`."
        )
    return SourceData(train=train, held_out=list(rows[:count]))


def others(rows: Sequence[Row], held_out: Sequence[Row]) -> list[Row]:
    """Those that equal none that is held out: the same tokens, counted from the same position."""
    own = {(tuple(row.ids), row.start) for row in held_out}
    return [row for row in rows if (tuple(row.ids), row.start) not in own]


def _rows(entry: DataSettings, split: str, settings: Settings, reader: Reader) -> list[Row]:
    """Those in which something counts; a token alone predicts nothing."""
    rows = []
    for row in read_rows(entry, split, entry.examples or settings.examples, settings.seed):
        found = example(row, entry.mapping)
        if found is None:
            raise DamError(_shapeless(row, entry))
        rows.append(reader.row(found))
    rows = [row for row in rows if row.counted]
    if rows:
        return rows
    if reader.loss_on == "completion":
        raise DamError(
            f"{entry.path} (split {split}) has no row with a completion within "
            f"{reader.length} tokens: raise `max_length`, or use `loss_on: all`."
        )
    raise DamError(f"{entry.path} (split {split}) has no row of two tokens or more.")


def _shapeless(row: dict, entry: DataSettings) -> str:
    there = f"it has {', '.join(f'{name}: {reprlib.repr(value)}' for name, value in row.items())}"
    if entry.mapping is None:
        return (
            f"{entry.path} has a row that is neither text, nor a conversation, nor prompt and "
            f"completion ({there}): name its columns in the `dam.data` entry of {entry.source}, "
            "for example `columns: {text: ...}`."
        )
    names = " and ".join(repr(name) for name in entry.mapping.values())
    return (
        f"{entry.path} has a row without {'/'.join(entry.mapping)} in {names} ({there}): correct "
        f"`columns` or `text` in the `dam.data` entry of {entry.source}."
    )
