"""A coefficient file in words and tables, for a terminal."""

from collections.abc import Iterator, Sequence

from mergekit_dam import table
from mergekit_dam.coefficients import CoefficientFile, Header, Source
from mergekit_dam.summary import Group, TensorStatistics, by_kind

INDENT = "  "


def as_text(file: CoefficientFile, tensors: Sequence[TensorStatistics]) -> str:
    """Metadata, a row for each kind of tensor, and the held-out figures where there are any."""
    parts = [
        f"{file.path}: {facts(file.header, tensors)}",
        _sources(file.header),
        _kinds(by_kind(list(tensors)), len(file.header.sources)),
    ]
    if file.header.results is not None:
        parts.append(table.as_text(file.header))
    return "\n\n".join(parts)


def facts(header: Header, tensors: Sequence[TensorStatistics]) -> str:
    numbers = sum(t.size for t in tensors) * len(header.sources)
    parts = [
        f"format {header.version}",
        f"mergekit-dam {header.package}",
        f"formula {header.formula}",
        f"granularity {header.granularity}",
        f"{len(tensors)} tensors",
        f"{numbers:,} coefficients",
    ]
    if header.preparation is not None:
        parts.append(f"sparsified by {header.preparation.method}")
    if header.origin != "fit":
        parts.append(header.origin)
    return ", ".join(parts)


def _sources(header: Header) -> str:
    lines = [
        f"{INDENT}{number}  {describe(source)}" for number, source in enumerate(header.sources, 1)
    ]
    if header.base is not None:
        lines.append(f"{INDENT}base  {describe(header.base)}")
    return "Sources:\n" + "\n".join(lines)


def describe(source: Source) -> str:
    """A source by name, revision and the first digits of its weights' fingerprint."""
    revision = f" at {source.revision}" if source.revision else ""
    role = "" if source.teaches else ", the base, which teaches nothing"
    return f"{source.reference}{revision} (weights {source.weights[:8]}){role}"


def _kinds(kinds: Sequence[Group], sources: int) -> str:
    header = ("kind of tensor", "tensors", "shape", *(f"source {n + 1}" for n in range(sources)))
    rows = [(k.name, str(k.count), shapes(k), *_cells(k)) for k in kinds]
    return "Mean ± standard deviation of each source's coefficients:\n" + "\n".join(
        INDENT + line for line in table.aligned([header, *rows])
    )


def shapes(group: Group) -> str:
    """B of one source; of several, the first and how many more."""
    first = str(list(group.shapes[0]))
    return first if len(group.shapes) == 1 else f"{first} +{len(group.shapes) - 1}"


def _cells(group: Group) -> Iterator[str]:
    for mean, spread in zip(group.mean, group.spread, strict=True):
        yield f"{mean:.3f} ± {spread:.3f}"
