"""The rows of a source as the model will see them."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from mergekit_dam.config import Settings
from mergekit_dam.config.recipe import data_entries
from mergekit_dam.data import Row, SourceData, is_missing
from mergekit_dam.errors import DamError
from mergekit_dam.fit.forecast import is_read
from mergekit_dam.fit.rows import generation, load_source_data
from mergekit_dam.plan import Plan

LINES, COLUMNS = 12, 100  # shown of a row
CHARACTERS = 200  # shown of each end of a part
START = "▸"  # stands where the counted part begins


@dataclass
class Rows:
    """The sources' rows, as far as they are there."""

    data: list[SourceData] = field(default_factory=list)
    previews: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_rows(settings: Settings, plan: Plan, out: str) -> Rows:
    """For a fit into the file `out`."""
    rows, entries = Rows(), data_entries(settings, plan.teachers)
    for source in plan.teachers:
        entry = entries.get(source)
        if entry is None or (entry.path is not None and is_missing(entry.path)):
            continue  # is a mistake already
        try:
            written = generation(source, settings, plan, out)
            if written and not written.path.exists():
                rows.previews.append(str(written))
                continue
            rows.data.append(load_source_data(source, settings, plan, out))
            rows.previews.append(preview(str(source), rows.data[-1], plan.tokenizer))
        except DamError as error:
            rows.problems.append(error.message)
    return rows


def repeated_rows(settings: Settings, plan: Plan, rows: Rows) -> Iterator[str]:
    """Of a step that takes more rows of each source than there are."""
    most = max((len(own.train) for own in rows.data), default=0)
    if settings.batch_size > most and is_read(plan, rows.data):
        yield (
            f"`dam.batch_size` is {settings.batch_size}, but of no source are there more rows to "
            f"train on than {most}, so each step computes some of them again: {most} is enough"
        )


def preview(source: str, data: SourceData, tokenizer: PreTrainedTokenizerBase) -> str:
    """Counts of a source's rows and tokens, and its first row."""
    rows = [*data.train, *data.held_out]
    return f"{source}: {_counts(data, rows)}\n{_shown(data.train[0], tokenizer)}"


def _counts(data: SourceData, rows: Sequence[Row]) -> str:
    tokens = sum(map(len, rows))
    counted, cut = sum(row.counted for row in rows), sum(row.is_cut for row in rows)
    parts = [
        f"{len(data.train):,} rows to train on and {len(data.held_out):,} held out",
        f"{tokens:,} tokens ({tokens / len(rows):.0f} a row, at most {max(map(len, rows)):,})",
        f"{cut / len(rows):.0%} of the rows are cut to their length",
    ]
    if any(row.start for row in rows):
        parts.insert(2, f"{counted:,} predictions count")
    return "; ".join(parts)


def _shown(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """With its special tokens; a sign shows where what counts begins, if not at once."""
    first = row.start + 1 if row.start else 0
    parts = [ids for ids in (row.ids[:first], row.ids[first:]) if ids]
    text = START.join(_ends(ids, tokenizer) for ids in parts)
    lines = [
        part
        for line in _printable(text).split("\n")
        for part in textwrap.wrap(line, COLUMNS, drop_whitespace=False) or [""]
    ]
    shown = [*lines[:LINES], *(["…"] if len(lines) > LINES else [])]
    return "\n".join(f"  | {line}" for line in shown)


def _ends(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """A token is a character or more, mostly: no more need be decoded than could be shown."""
    if len(ids) <= 2 * CHARACTERS and len(text := tokenizer.decode(ids)) <= 2 * CHARACTERS:
        return text
    begin, end = tokenizer.decode(ids[:CHARACTERS]), tokenizer.decode(ids[-CHARACTERS:])
    return f"{begin[:CHARACTERS]} … {end[-CHARACTERS:]}"


def _printable(text: str) -> str:
    """What would steer a terminal is written out."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
