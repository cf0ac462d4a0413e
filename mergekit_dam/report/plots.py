"""The plots, as PNG bytes for a light page and a dark one.

Sources are called by their numbers: names, which may be anything, stand in the page's own text.

The figures are drawn without pyplot, so that no window system and no global state is touched.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from mergekit_dam.coefficients import Results
from mergekit_dam.summary import Group

# Told apart by colour-blind readers, and legible on white and on near-black.
COLOURS = ("#0b84c6", "#e07b00", "#009e73", "#d0568f", "#8d6cd9", "#a08300", "#d24a3a", "#6b7f8c")


NEUTRAL = "#7d8590"  # legible on both, too
DEVIATION, SPREAD = "RdBu_r", "viridis"  # colour maps: one is neutral in its middle
TEXT = {"light": "#24292f", "dark": "#d5dae1"}
LINES = {"light": "#b6bcc4", "dark": "#4a525c"}

Pictures = tuple[bytes, bytes]  # on light and on dark ground


def colour(source: int) -> str:
    """Of a source by its number from 0; beyond eight, hues of a wheel."""
    if source < len(COLOURS):
        return COLOURS[source]
    return to_hex(matplotlib.colormaps["hsv"]((source * 0.618) % 1.0))


def heat_map(
    cells: Mapping[tuple[str, int | None], Group], source: int, limits: "Limits"
) -> Pictures:
    """Kinds of tensor by layers, of one source: the mean above, the spread below."""
    kinds, layers = axes_of(cells)
    height = 0.24 * len(kinds) + 0.75
    figure, (top, bottom) = _figure(9.6, 2 * height, rows=2)
    for axes, field, title, colours, (low, high) in (
        (top, "mean", "mean", DEVIATION, limits.mean(source)),
        (bottom, "spread", "standard deviation", SPREAD, limits.spread),
    ):
        values = _matrix(cells, kinds, layers, source, field)
        image = axes.imshow(
            values, aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest"
        )
        axes.set_yticks(range(len(kinds)), [_plain(short(kind)) for kind in kinds])
        places = range(0, len(layers), max(1, -(-len(layers) // 20)))
        axes.set_xticks(places, [str(layers[place]) for place in places])
        axes.set_title(title, loc="left")
        figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01).outline.set_visible(False)
    bottom.set_xlabel("layer")
    return _pictures(figure)


@dataclass(frozen=True)
class Limits:
    """The colour scales that all sources share."""

    middles: tuple[float, ...]  # each source's coefficient in the plain average
    reach: float  # on both sides of it
    spread: tuple[float, float]

    def mean(self, source: int) -> tuple[float, float]:
        return self.middles[source] - self.reach, self.middles[source] + self.reach

    @classmethod
    def of(
        cls, cells: Mapping[tuple[str, int | None], Group], middles: Sequence[float]
    ) -> "Limits":
        """One cell in a hundred may lie beyond: an outlier would pale all others."""
        groups = list(cells.values())
        deviations = [
            abs(mean - middle)
            for group in groups
            for mean, middle in zip(group.mean, middles, strict=True)
        ]
        reach = float(np.quantile(deviations, 0.99)) or 0.01
        spreads = [spread for group in groups for spread in group.spread]
        widest = float(np.quantile(spreads, 0.99)) or 0.01
        return cls(tuple(middles), reach, (0.0, widest))


def axes_of(cells: Mapping[tuple[str, int | None], Group]) -> tuple[list[str], list[int]]:
    """The kinds and the layers of a heat map, in order."""
    layered = [(kind, layer) for kind, layer in cells if layer is not None]
    return list(dict.fromkeys(kind for kind, _ in layered)), sorted({layer for _, layer in layered})


def short(kind: str) -> str:
    """A kind of tensor without what all have: `self_attn.q_proj`."""
    name = kind.partition("*.")[2] or kind
    name = name.removesuffix(".weight")
    return name if len(name) <= 32 else f"…{name[-31:]}"


def _plain(text: str) -> str:
    """Text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def _matrix(cells, kinds: list[str], layers: list[int], source: int, field: str) -> np.ndarray:
    values = np.full((len(kinds), len(layers)), np.nan)
    for row, kind in enumerate(kinds):
        for column, layer in enumerate(layers):
            if (kind, layer) in cells:
                values[row, column] = getattr(cells[kind, layer], field)[source]
    return values


def histograms(edges: Sequence[float], parts: Sequence[Sequence[float]]) -> Pictures:
    """The values of all coefficients, a line for each source."""
    figure, (axes,) = _figure(9.6, 3.2)
    for source, part in enumerate(parts):
        axes.stairs(part, edges, color=colour(source), linewidth=1.4, label=_label(source))
    _finish(figure, axes, "coefficient", "share of all coefficients")
    return _pictures(figure)


def shares(parts: Mapping[int, Sequence[float]]) -> Pictures:
    """Each source's part of a layer, stacked, from the first layer to the last."""
    figure, (axes,) = _figure(9.6, 3.2)
    layers, values = list(parts), np.array(list(parts.values()))  # [layers, sources]
    below = np.zeros(len(layers))
    for source in range(values.shape[1]):
        axes.bar(layers, values[:, source], 1.0, below, color=colour(source), label=_label(source))
        below += values[:, source]
    axes.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    axes.set_ylim(0, 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(figure, axes, "layer", "share of Σ|c|")
    return _pictures(figure)


def curves(results: Results) -> Pictures:
    """The loss of the fit's steps, and the held-out KL of each source."""
    figure, (left, right) = _figure(9.6, 3.2, columns=2)
    steps = [point.step for point in results.history]
    left.plot(steps, [point.loss for point in results.history], color=NEUTRAL, linewidth=1.2)
    for source, (places, values) in enumerate(held_out(results)):
        right.plot(
            places, values, color=colour(source), marker="o", markersize=3, label=_label(source)
        )
    right.set_ylim(bottom=0)
    _finish(figure, left, "step", "loss", legend=False)
    _finish(figure, right, "step", "held-out KL, nats a token")
    return _pictures(figure)


def held_out(results: Results) -> list[tuple[list[int], list[float]]]:
    """(steps, KL) of each source: of the start at 0, where it was evaluated on the way, and after
    the fit."""
    last = results.history[-1].step if results.history else 0
    points = [
        *((point.step, point.kl) for point in results.held_out if point.step < last),
        (last, [figures.kl for figures in results.fit]),
    ]
    return [
        ([step for step, _ in points], [kl[source] for _, kl in points])
        for source in range(len(results.fit))
    ]


def _label(source: int) -> str:
    return str(source + 1)


def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    figure = Figure((width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    found = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in found:
        axes.patch.set_alpha(0)
    return figure, found


def _finish(figure: Figure, axes: Axes, x: str, y: str, legend: bool = True) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    if legend:
        handles, labels = axes.get_legend_handles_labels()
        place = {"loc": "outside upper left", "ncols": 16, "frameon": False}
        figure.legend(handles, labels, title="source", alignment="left", **place)


def _pictures(figure: Figure) -> Pictures:
    return _picture(figure, "light"), _picture(figure, "dark")


def _picture(figure: Figure, ground: str) -> bytes:
    for text in figure.findobj(Text):
        text.set(color=TEXT[ground], fontsize=8)
    for axes in figure.axes:
        axes.tick_params(color=LINES[ground])
        for line in (*axes.get_xgridlines(), *axes.get_ygridlines(), *axes.spines.values()):
            line.set_color(LINES[ground])
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    figure.set_layout_engine("none")  # it stays where it is, in another colour
    return stream.getvalue()
