"""Data sets, by the `datasets` library: files, folders, the Hub."""

import glob
import itertools
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import datasets
import pandas

from mergekit_dam.config.data_settings import ENDINGS, DataSettings, ending, is_local
from mergekit_dam.errors import DamError, in_one_line

# File name endings -> the builder of `datasets` that reads them.
BUILDERS = {name: name for name in ENDINGS} | {"jsonl": "json", "txt": "text"}
SAVED = ("dataset_dict.json", "state.json")  # in a folder that `save_to_disk` has written
SHUFFLED = 10_000  # rows held for a random choice where they are streamed


def is_missing(path: str) -> bool:
    """Whether a data path must be here, rather than on the Hub, and is not."""
    return is_local(path) and not os.path.exists(path) and not _files(path)


def read_rows(entry: DataSettings, split: str, count: int, seed: int) -> Iterator[Mapping]:
    """Up to `count` rows in an order fixed by the seed, so that any part is a fair sample.

    Raises DamError for data that cannot be read.
    """
    if is_missing(entry.path):
        raise DamError(f"The data file {entry.path} of the source {entry.source} does not exist.")
    with _in_words(entry, split):
        rows = _open(entry, split)
        if isinstance(rows, datasets.IterableDataset):
            shuffled = rows.shuffle(seed=seed, buffer_size=SHUFFLED)
            yield from itertools.islice(shuffled, count)
            return
        order = list(range(len(rows)))
        random.Random(seed).shuffle(order)
        yield from rows.select(order[:count])


def _open(entry: DataSettings, split: str) -> datasets.Dataset | datasets.IterableDataset:
    if any(os.path.exists(os.path.join(entry.path, name)) for name in SAVED):
        return _saved(entry, split)
    source: dict[str, Any] = {"path": entry.path, "name": entry.name, "revision": entry.revision}
    if files := _files(entry.path):
        source = {"path": _builder(files[0]), "data_files": files}
        if source["path"] == "csv":
            source |= _as_text(files[0])
    return datasets.load_dataset(**source, split=split, streaming=entry.streaming)


def _as_text(file: str) -> dict[str, Any]:
    """A cell is text as it stands: 007 is no number, NA is not nothing."""
    columns = pandas.read_csv(file, nrows=0).columns
    features = datasets.Features({str(name): datasets.Value("string") for name in columns})
    return {"features": features, "keep_default_na": False}


def _saved(entry: DataSettings, split: str) -> datasets.Dataset:
    """What `save_to_disk` has written: several splits, or one without a name."""
    saved = datasets.load_from_disk(entry.path)
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if split not in splits:
        raise DamError(
            f"{entry.path} has no split {split!r}: its splits, which cannot be sliced, are "
            f"{', '.join(splits)}."
        )
    return splits[split]


def files_of(path: str) -> list[str]:
    """The files that a path, a folder or a pattern stands for here; none for a name on the Hub."""
    if os.path.isdir(path):
        found = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
        return sorted(found)
    return _files(path)


def _files(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    return sorted(filter(os.path.isfile, glob.glob(path))) if glob.has_magic(path) else []


def _builder(path: str) -> str:
    if ending(path) not in BUILDERS:
        raise DamError(
            f"{path} has an ending that says nothing of its format: rename it to one of "
            f"{', '.join(sorted(BUILDERS))}."
        )
    return BUILDERS[ending(path)]


@contextmanager
def _in_words(entry: DataSettings, split: str) -> Iterator[None]:
    """Rows are read as they are used, so an error may come late."""
    try:
        yield
    except (DamError, GeneratorExit):
        raise
    except Exception as error:
        cause = error.__cause__ or error
        reason = in_one_line(cause) if str(cause) else "is it empty?"
        raise DamError(
            f"The data {entry.path} (split {split}) of the source {entry.source} cannot be read: "
            f"{reason}"
        ) from error
