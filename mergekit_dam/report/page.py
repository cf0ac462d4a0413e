"""The page: one HTML file that holds all it shows, and no script."""

import base64
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergekit_dam import inspection, summary, table
from mergekit_dam.coefficients import CoefficientFile, Header
from mergekit_dam.errors import DamError
from mergekit_dam.output import write_text
from mergekit_dam.summary import TensorStatistics

GENERATOR = '<meta name="generator" content="mergekit-dam">'  # by which a page of ours is known
TEMPLATE = Path(__file__).with_name("page.html")
HOW_TO_DRAW = (
    "For a page with plots install matplotlib, the extra `report`; `mergekit-dam report FILE` "
    "then writes it."
)


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def page_beside(path: str) -> str:
    """Where the page about a coefficient file goes: `dam.html` for `dam.safetensors`."""
    return str(Path(path).with_suffix(".html"))


def write_page(file: CoefficientFile, out: str, png: str | None = None) -> None:
    """Write the page about a file to `out`, and each plot into the folder `png`, too.

    An earlier page of ours is replaced. Raises DamError where something else is in its place,
    where nothing can be written, and without matplotlib.
    """
    if not can_draw():
        raise DamError(HOW_TO_DRAW)
    require_replaceable(out)
    tensors = summary.statistics(file)
    plots = draw(file, tensors)
    write_text(out, render(file, tensors, plots))
    if png is not None:
        _write_plots(plots, Path(png))


def require_replaceable(out: str) -> None:
    path = Path(out)
    if path.is_dir():
        raise DamError(f"{out} is a folder: give the page the name of a file.")
    if path.exists() and GENERATOR not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise DamError(f"{out} is there and is no report of ours: give the page another name.")


@dataclass(frozen=True)
class Plot:
    """One picture in both themes."""

    name: str  # of a file
    light: bytes
    dark: bytes

    @property
    def sources(self) -> tuple[str, str]:
        """Both as data URLs."""
        return tuple(
            "data:image/png;base64," + base64.b64encode(data).decode()
            for data in (self.light, self.dark)
        )


def draw(file: CoefficientFile, tensors: list[TensorStatistics]) -> dict[str, Plot]:
    """All plots of a file by name; without those for which it has no numbers."""
    from mergekit_dam.report import plots

    header = file.header
    cells, parts = summary.cells(tensors), summary.shares(summary.by_layer(tensors))
    edges, counts = summary.histogram(file, tensors)
    limits = plots.Limits.of(cells, middles(header))

    pictures = {"histogram": plots.histograms(edges, counts)}
    if parts:
        pictures["shares"] = plots.shares(parts)
        for source in range(len(header.sources)):
            pictures[f"source-{source + 1}"] = plots.heat_map(cells, source, limits)
    if header.results is not None and header.results.history:
        pictures["curves"] = plots.curves(header.results)
    return {name: Plot(name, *both) for name, both in pictures.items()}


def middles(header: Header) -> tuple[float, ...]:
    """Each source's coefficient in the plain average, which its heat map shows as neutral."""
    return tuple(source.teaches / len(header.teachers) for source in header.sources)


def render(file: CoefficientFile, tensors: list[TensorStatistics], plots: dict[str, Plot]) -> str:
    """The page's text. Everything from the file is escaped."""
    from jinja2 import Environment, StrictUndefined

    from mergekit_dam.report.plots import colour

    header = file.header
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=Path(file.path).name,
        header=header,
        facts=inspection.facts(header, tensors),
        colours=[colour(number) for number in range(len(header.sources))],
        kinds=summary.by_kind(tensors),
        shape=inspection.shapes,
        columns=table.COLUMNS,
        rows=table.rows(header) if header.results else [],
        plots=plots,
        middle=middles(header)[0],
        data=_data(header),
        settings=_settings(header),
        merge=yaml.safe_dump(header.merge, sort_keys=False) if header.merge else "",
    )


def _data(header: Header) -> list[dict[str, Any]]:
    """The entries of `dam.data`, as far as they are what we write."""
    entries = header.settings.get("data")
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []


def _settings(header: Header) -> list[tuple[str, str]]:
    """Key and value, but for the data, which have a table of their own."""
    rows = []
    for key, value in header.settings.items():
        if isinstance(value, dict):
            rows += [(f"{key}.{inner}", _text(v)) for inner, v in value.items()]
        elif key != "data":
            rows.append((key, _text(value)))
    return rows


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _write_plots(plots: dict[str, Plot], folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for plot in plots.values():
            (folder / f"{plot.name}.png").write_bytes(plot.light)
            (folder / f"{plot.name}-dark.png").write_bytes(plot.dark)
    except OSError as error:
        raise DamError(
            f"The plots cannot be written to {folder} ({error.strerror}): give another folder."
        ) from None
