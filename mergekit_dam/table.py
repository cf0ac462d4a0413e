"""The closing table: each source, the plain average and the fit, on held-out rows."""

import html
from collections.abc import Iterable, Sequence

from mergekit_dam.coefficients import Figures, Header

COLUMNS = (
    "source",
    "tokens",
    "KL average",
    "KL fit",
    "perplexity source",
    "perplexity average",
    "perplexity fit",
)


def rows(header: Header) -> list[tuple[str, ...]]:
    """One row for each source and, last, the mean over the sources."""
    average, fit = header.results.average, header.results.fit
    table = [
        (source.reference, f"{a.tokens}", *_cells(a, f))
        for source, a, f in zip(header.teachers, average, fit, strict=True)
    ]
    return [*table, ("mean", "", *_cells(_mean(average), _mean(fit)))]


def _cells(average: Figures, fit: Figures) -> tuple[str, ...]:
    return (
        f"{average.kl:.4f}",
        f"{fit.kl:.4f}",
        f"{fit.source_perplexity:.4g}",
        f"{average.perplexity:.4g}",
        f"{fit.perplexity:.4g}",
    )


def _mean(figures: Sequence[Figures]) -> Figures:
    def mean(name: str) -> float:
        return sum(getattr(f, name) for f in figures) / len(figures)

    return Figures(
        tokens=sum(f.tokens for f in figures),
        **{name: mean(name) for name in ("kl", "perplexity", "source_perplexity")},
    )


def as_text(header: Header) -> str:
    """Aligned columns for a terminal."""
    head, *lines = aligned([COLUMNS, *rows(header)])
    return "\n".join([head, "-" * max(map(len, (head, *lines))), *lines])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns of one width, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def piped(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = [columns, ("---", *["---:"] * (len(columns) - 1)), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def as_markdown(header: Header) -> str:
    """The section that `run` adds to mergekit's model card."""
    table = piped(COLUMNS, rows(header))
    return (
        "## Held-out results\n\n"
        "KL divergence to each source (nats a token) and perplexity, on rows of that source's "
        "own data that the fit did not see: the plain average of the sources, and this merge by "
        "[mergekit-dam](https://arxiv.org/abs/2410.08371).\n\n"
        f"{table}\n"
    )


def cell(text: str) -> str:
    """Text for a cell of a Markdown table, which may hold anything."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")
