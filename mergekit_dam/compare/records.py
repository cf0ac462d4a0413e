"""What a comparison writes down: one entry for each model and each merge, kept as they come."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic

from mergekit_dam.coefficients import Frozen
from mergekit_dam.errors import DamError
from mergekit_dam.output import write_text

RESULTS = "results.json"
Kind = Literal["source", "base", "merge"]


class Cost(Frozen):
    """What it took to find a merge. The evaluation on held-out rows is not in it."""

    seconds: float = 0.0
    forward_passes: float = 0.0  # rows through one model, teachers included
    backward_passes: float = 0.0
    tokens: float = 0.0  # that entered a model, teachers included
    peak_memory: int = 0  # bytes: of the GPU where there is one, else resident in the process
    is_whole: bool = True  # False: of the last part of a fit that was interrupted

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            seconds=self.seconds + other.seconds,
            forward_passes=self.forward_passes + other.forward_passes,
            backward_passes=self.backward_passes + other.backward_passes,
            tokens=self.tokens + other.tokens,
            peak_memory=max(self.peak_memory, other.peak_memory),
            is_whole=self.is_whole and other.is_whole,
        )


class Scores(Frozen):
    """Of one model on one source's rows; means over the predicted tokens."""

    tokens: int
    kl: float  # KL(source ‖ model), nats a token
    perplexity: float
    agreement: float  # share of the tokens whose likeliest next token is the source's
    answers: int = 0  # rows with an answer
    exact: float | None = None  # share of the answers that greedy decoding gives exactly


class Entry(Frozen):
    """One line of the table."""

    name: str
    kind: Kind
    scores: tuple[Scores, ...] = ()  # one for each source; none where it was left out
    reason: str | None = None  # why it was left out
    cost: Cost | None = None  # of merges
    tried: int = 0  # candidates, of which the one with the lowest KL on fit rows was taken
    chosen: Mapping[str, Any] = pydantic.Field(default={})  # the parameters of that one
    config: str | None = None  # the YAML that makes this merge again, in the folder


class Results(Frozen):
    """The whole comparison."""

    identity: str  # changes with whatever the numbers depend on
    package: str
    sources: tuple[str, ...]
    entries: tuple[Entry, ...] = ()

    def with_entry(self, entry: Entry) -> "Results":
        kept = tuple(e for e in self.entries if (e.name, e.kind) != (entry.name, entry.kind))
        return self.model_copy(update={"entries": (*kept, entry)})

    def without(self, merges: Collection[str]) -> "Results":
        kept = tuple(e for e in self.entries if e.kind != "merge" or e.name not in merges)
        return self.model_copy(update={"entries": kept})

    def find(self, name: str, kind: Kind = "merge") -> Entry | None:
        """A model may have the name of a method."""
        return next((e for e in self.entries if (e.name, e.kind) == (name, kind)), None)


def mean(entry: Entry, field: str) -> float | None:
    """Over the sources; None where no source has it."""
    values = [getattr(scores, field) for scores in entry.scores]
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def retention(entry: Entry, results: Results) -> list[float | None]:
    """For each source: the exact matches over the source's own; where its rows have no answers,
    the agreement with the source."""
    own = [results.find(name, "source") for name in results.sources]
    kept: list[float | None] = []
    for number, scores in enumerate(entry.scores):
        best = own[number].scores[number].exact if own[number] and own[number].scores else None
        if scores.exact is None:
            kept.append(scores.agreement)
        else:
            kept.append(scores.exact / best if best else None)
    return kept


def read(path: Path) -> Results | None:
    """Raises DamError for a file that is none of ours."""
    if not path.exists():
        return None
    try:
        return Results.model_validate_json(path.read_text(encoding="utf-8"))
    except (pydantic.ValidationError, UnicodeDecodeError):
        raise DamError(
            f"{path} is not a comparison of this version: give another folder, or move it away."
        ) from None


def write(path: Path, results: Results) -> None:
    write_text(path, json.dumps(results.model_dump(mode="json"), indent=1) + "\n")


def read_cost(path: Path) -> Cost | None:
    try:
        return Cost.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, pydantic.ValidationError, UnicodeDecodeError):
        return None


def merges(results: Results) -> Sequence[Entry]:
    return [e for e in results.entries if e.kind == "merge" and e.scores]


def one_line(values: Mapping[str, Any]) -> str:
    """Chosen parameters, for a table."""
    return ", ".join(f"{key} {value}" for key, value in values.items())


def short_name(model: str) -> str:
    """The last part of a path."""
    return model.rstrip("/").rpartition("/")[2]


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Model -> the last part of its path, or the whole where two have the same."""
    ends = [short_name(name) for name in names]
    return {
        name: name if ends.count(end) > 1 else end for name, end in zip(names, ends, strict=True)
    }
