"""Quality against cost, and what is kept of each skill. Needs matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mergekit_dam.compare.records import Entry, Results, mean, merges, retention, short_name

QUALITY, RETENTION = "quality.png", "retention.png"
PLACES = [((7, 3), "left"), ((7, -11), "left"), ((-7, 3), "right"), ((-7, -11), "right")]
DARK = 0.75  # of the range of blue: text on it is white
OURS, OTHERS = "#c2410c", "#475569"


def draw(out: Path, results: Results) -> list[str]:
    """Writes the pictures and returns their names; none without a merge."""
    if not merges(results):
        return []
    _quality(results).savefig(out / QUALITY, dpi=150, bbox_inches="tight")
    _retention(results).savefig(out / RETENTION, dpi=150, bbox_inches="tight")
    return [QUALITY, RETENTION]


def _quality(results: Results) -> Figure:
    """Each merge a point: what it cost, and how far it is from its sources."""
    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot()
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="forward passes (rows through one model, teachers included; at 1: none)",
        ylabel="mean held-out KL to the sources (nats a token)",
    )
    points = [
        (max(entry.cost.forward_passes, 1) if entry.cost else 1, mean(entry, "kl"))
        for entry in merges(results)
    ]
    axes.scatter(*zip(*points, strict=True), c=[_colour(e) for e in merges(results)], zorder=3)
    axes.margins(0.15)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:.0e}"[0] in "25" else "")
    axes.grid(color="#e2e8f0", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    _name(axes, points, [entry.name for entry in merges(results)])
    return figure


def _name(axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Names beside their points, where no other name is."""
    axes.figure.draw_without_rendering()
    taken = []
    for point, name in zip(points, names, strict=True):
        for place, side in PLACES:
            text = axes.annotate(
                name, point, xytext=place, textcoords="offset points", ha=side, fontsize=9
            )
            box = text.get_window_extent()
            if not box.count_overlaps(taken):
                break
            text.remove()
        else:
            text = axes.annotate(name, point, xytext=PLACES[0][0], textcoords="offset points")
        taken.append(text.get_window_extent())


def _retention(results: Results) -> Figure:
    """A field for each merge and source; white is nothing kept."""
    entries = [e for e in results.entries if e.scores and e.kind != "source"]
    entries.sort(key=lambda e: mean(e, "kl"))
    values = [[math.nan if v is None else v for v in retention(e, results)] for e in entries]
    figure = Figure(figsize=(2.5 + 1.1 * len(results.sources), 1.2 + 0.36 * len(entries)))
    axes = figure.add_subplot()
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
    for row, numbers in enumerate(values):
        for column, value in enumerate(numbers):
            shown = "-" if math.isnan(value) else f"{value:.2f}"
            ink = "white" if value > DARK else "black"
            axes.text(column, row, shown, ha="center", va="center", fontsize=9, color=ink)
    axes.set_xticks(range(len(results.sources)), [short_name(name) for name in results.sources])
    axes.set_yticks(range(len(entries)), [short_name(e.name) for e in entries])
    axes.set_title("Retention: of each source's own score", fontsize=10)
    axes.tick_params(length=0, labelsize=9)
    axes.tick_params(axis="x", rotation=30 if len(results.sources) > 4 else 0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _colour(entry: Entry) -> str:
    return OURS if entry.name.startswith("dam") else OTHERS
