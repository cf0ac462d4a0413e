"""Each source's own rows, as token ids of the merge's vocabulary."""

import hashlib
import json
import os
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from mergekit_dam.config.settings import DataSettings, Settings
from mergekit_dam.errors import DamError

# File name endings -> the builder of `datasets` that reads them.
BUILDERS = {"json": "json", "jsonl": "json", "parquet": "parquet", "csv": "csv", "txt": "text"}


@dataclass(frozen=True)
class Row:
    """A text as the model reads it."""

    ids: list[int]
    start: int = 0  # first position whose next token counts; those before predict a prompt

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class SourceData:
    """The rows of one source."""

    train: list[Row]
    held_out: list[Row]

    def digest(self) -> str:
        """Changes when any token does."""
        rows = [[(row.ids, row.start) for row in part] for part in (self.train, self.held_out)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def is_local(path: str) -> bool:
    """Whether a data path must be a file or folder here rather than a name on the Hub."""
    return (
        os.path.exists(path)
        or path.startswith((".", "/", "~"))
        or path.rpartition(".")[2].lower() in BUILDERS
    )


def load_rows(
    entry: DataSettings,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,  # of the merge: gives the ids
    source_tokenizer: PreTrainedTokenizerBase,  # of the source: gives the chat template
    limit: int | None = None,  # positions that the model has
) -> SourceData:
    """Read, render, tokenise and split the rows of one source; deterministic for a seed.

    Raises DamError for data that cannot be read or lack the column.
    """
    examples = entry.examples or settings.examples
    held_out = entry.held_out if entry.held_out is not None else settings.held_out
    length = min(entry.max_length or settings.max_length, limit or sys.maxsize)

    def tokens(split: str) -> list[Row]:
        chosen = _choose(_load(entry, split), examples, settings.seed)
        rows = [Row(_tokenize(row, entry, tokenizer, source_tokenizer, length)) for row in chosen]
        rows = [row for row in rows if len(row) > 1]  # a token alone predicts nothing
        if not rows:
            raise DamError(f"{entry.path} (split {split}) has no row of two tokens or more.")
        return rows

    rows = tokens(entry.split)
    if isinstance(held_out, str):
        return SourceData(train=rows, held_out=tokens(held_out))
    if len(rows) < 2:
        raise DamError(f"{entry.path} has one row only: the held-out share needs another.")
    count = min(max(1, round(held_out * len(rows))), len(rows) - 1)
    return SourceData(train=rows[count:], held_out=rows[:count])


def _load(entry: DataSettings, split: str) -> datasets.Dataset:
    options: dict[str, Any] = {"path": entry.path, "name": entry.name}
    ending = entry.path.rpartition(".")[2].lower()
    if os.path.isfile(entry.path):
        if ending not in BUILDERS:
            raise DamError(
                f"{entry.path} has an ending that says nothing of its format: rename it to one "
                f"of {', '.join(sorted(BUILDERS))}."
            )
        options = {"path": BUILDERS[ending], "data_files": entry.path}
    elif is_local(entry.path) and not os.path.isdir(entry.path):
        raise DamError(f"The data file {entry.path} of the source {entry.source} does not exist.")
    try:
        return datasets.load_dataset(**options, split=split)
    except Exception as error:
        cause = " ".join(str(error.__cause__ or error).split()) or "is it empty?"
        raise DamError(
            f"The data {entry.path} (split {split}) of the source {entry.source} cannot be read: "
            f"{cause}"
        ) from error


def _choose(rows: datasets.Dataset, count: int, seed: int) -> Iterable[Mapping]:
    """A seeded choice in a seeded order, so that the held-out rows are a fair sample."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return rows.select(order[:count])


def _tokenize(
    row: Mapping,
    entry: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    source_tokenizer: PreTrainedTokenizerBase,
    length: int,
) -> list[int]:
    messages = _messages(row, entry, has_template=source_tokenizer.chat_template is not None)
    if messages is not None:
        # A template writes the special tokens itself.
        text = _render(messages, entry, source_tokenizer)
        return tokenizer(text, add_special_tokens=False)["input_ids"][:length]
    if entry.text is None and _has(row, str, "prompt", "completion"):
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        end = tokenizer.eos_token_id
        return (ids if end is None or ids[-1:] == [end] else [*ids, end])[:length]
    return tokenizer(_text(row, entry))["input_ids"][:length]


def _has(row: Mapping, kind: type, *columns: str) -> bool:
    """Files with mixed rows give None for the columns that a row lacks."""
    return all(isinstance(row.get(column), kind) for column in columns)


def _messages(row: Mapping, entry: DataSettings, *, has_template: bool) -> Sequence[Mapping] | None:
    """The row as a conversation, where it is one or the source expects one."""
    if entry.text is not None:
        return None
    if _has(row, list, "messages"):
        return row["messages"]
    if _has(row, list, "prompt", "completion"):
        return [*row["prompt"], *row["completion"]]
    if has_template and _has(row, str, "prompt", "completion"):
        return [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    return None


def _render(messages: Sequence[Mapping], entry: DataSettings, tokenizer: Any) -> str:
    if tokenizer.chat_template is None:
        raise DamError(
            f"{entry.path} holds conversations, but the source {entry.source} has no chat "
            "template: give its data as a text column, or as `prompt` and `completion`."
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False)
    except Exception as error:
        raise DamError(
            f"A conversation in {entry.path} does not fit the chat template of {entry.source}: "
            f"{error}"
        ) from error


def _text(row: Mapping, entry: DataSettings) -> str:
    column = entry.text or "text"
    if not _has(row, str, column):
        raise DamError(
            f"{entry.path} has a row without text in the column {column!r} (its columns are "
            f"{', '.join(row)}): name the column with `text:` in the `dam.data` entry of "
            f"{entry.source}."
        )
    return row[column]
