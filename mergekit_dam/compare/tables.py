"""The results for people: a table on the terminal, a page of Markdown, two plots."""

from collections.abc import Sequence
from pathlib import Path

from mergekit_dam.compare.records import (
    Cost,
    Entry,
    Results,
    mean,
    merges,
    one_line,
    retention,
    short_name,
    short_names,
)
from mergekit_dam.output import write_text
from mergekit_dam.table import aligned, piped

MARKDOWN = "results.md"
COLUMNS = (
    "merge", "KL", "perplexity", "agreement", "exact match", "retention",
    "seconds", "forward passes", "backward passes", "tokens", "peak memory",
)  # fmt: skip
EXPLAINED = (
    "Means over the sources, each on its own held-out rows, which no fit and no search has seen. "
    "KL: divergence from the source to the model, nats a token. Agreement: share of tokens whose "
    "likeliest next token is the source's. Exact match: answers that greedy decoding gives to the "
    "last token. Retention: exact match over the source's own, or agreement where the rows have "
    "no answers. Cost is that of finding the merge: passes are rows through one model, teachers "
    "included, and tokens those that entered a model. Peak memory is the GPU's "
    "where there is one, else that of the process."
)


def line(entry: Entry) -> str:
    """One entry, as soon as it is there."""
    if entry.reason is not None:
        return f"{entry.name}: left out: {entry.reason}"
    exact = mean(entry, "exact")
    shown = "" if exact is None else f", exact match {exact:.3f}"
    return f"{short_name(entry.name)}: KL {mean(entry, 'kl'):.4f}{shown}"


def write(out: Path, results: Results, say) -> None:
    """Everything but `results.json`, made again from it."""
    say(f"\n{as_text(results)}\n")
    for entry in results.entries:
        if entry.reason is not None:
            say(f"Left out: {entry.name}: {entry.reason}")
    pictures = _plots(out, results, say)
    write_text(out / MARKDOWN, as_markdown(results, pictures))
    say(f"The results are in {out / MARKDOWN}, the YAML of each merge in {out / 'configs'}.")


def _plots(out: Path, results: Results, say) -> list[str]:
    try:
        from mergekit_dam.compare.plots import draw
    except ImportError:
        say("For plots: pip install 'mergekit-dam[report]', and run this again.")
        return []
    return draw(out, results)


def as_text(results: Results) -> str:
    """Aligned columns for a terminal."""
    table = [COLUMNS, *_rows(results)]
    used = [c for c in range(len(COLUMNS)) if any(row[c] not in ("", "-") for row in table[1:])]
    head, *lines = aligned([[row[c] for c in used] for row in table])
    return "\n".join([head, "-" * len(head), *lines])


def as_markdown(results: Results, pictures: Sequence[str]) -> str:
    parts = [
        "# Comparison",
        EXPLAINED,
        piped(COLUMNS, _rows(results)),
        *(f"![{Path(name).stem}]({name})" for name in pictures),
        "## Retention of each source",
        _by_source(results, lambda entry: retention(entry, results), "{:.3f}"),
        "## KL to each source",
        _by_source(results, lambda entry: [s.kl for s in entry.scores], "{:.4f}"),
        "## What was chosen",
        "On fit rows, among the candidates of each method; the YAML makes the merge again.",
        piped(
            ("merge", "candidates", "chosen", "YAML"),
            [
                (e.name, str(e.tried), one_line(e.chosen) or "-", f"[{e.config}]({e.config})")
                for e in merges(results)
            ],
        ),
    ]
    left_out = [f"- {e.name}: {e.reason}" for e in results.entries if e.reason is not None]
    if left_out:
        parts += ["## Left out", "\n".join(left_out)]
    return "\n\n".join(parts) + "\n"


def _rows(results: Results) -> list[tuple[str, ...]]:
    """The models first, then the merges from the worst to the best."""
    models = [e for e in results.entries if e.kind != "merge" and e.scores]
    ordered = sorted(merges(results), key=lambda e: mean(e, "kl"), reverse=True)
    names = short_names([entry.name for entry in [*models, *ordered]])
    return [
        (
            names[entry.name],
            f"{mean(entry, 'kl'):.4f}",
            f"{mean(entry, 'perplexity'):.4g}",
            _number(mean(entry, "agreement")),
            _number(mean(entry, "exact")),
            _number(_mean(retention(entry, results))),
            *_cost(entry.cost),
        )
        for entry in [*models, *ordered]
    ]


def _cost(cost: Cost | None) -> tuple[str, ...]:
    if cost is None:
        return ("-",) * 5
    more = "" if cost.is_whole else "≥ "
    return (
        f"{more}{cost.seconds:.1f}",
        f"{more}{cost.forward_passes:,.0f}",
        f"{more}{cost.backward_passes:,.0f}",
        f"{more}{cost.tokens:,.0f}",
        f"{cost.peak_memory / 2**20:,.0f} MB",
    )


def _by_source(results: Results, values, pattern: str) -> str:
    """One line for each model and merge, one column for each source."""
    names = short_names([entry.name for entry in results.entries])
    lines = []
    for entry in results.entries:
        if entry.scores:
            cells = ["-" if v is None else pattern.format(v) for v in values(entry)]
            lines.append((names[entry.name], *cells))
    return piped(("merge", *(names.get(name, name) for name in results.sources)), lines)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
