"""Whether a fit was worth it: its held-out KL against that of its start."""

import logging
from collections.abc import Callable, Sequence

from mergekit_dam.coefficients import Figures
from mergekit_dam.model import MergedModel

LOG = logging.getLogger(__name__)
NOISE = 1e-4  # of a mean KL, which differs a little from device to device


def at_start(
    merged: MergedModel, average: Sequence[Figures], evaluate: Callable[[], Sequence[Figures]]
) -> Sequence[Figures]:
    """The figures of the model as it is; those of the average are known already."""
    return average if merged.is_average() else evaluate()


def mean_kl(figures: Sequence[Figures]) -> float:
    return sum(figure.kl for figure in figures) / len(figures)


def warn_if_worse(start: Sequence[Figures], end: Sequence[Figures]) -> None:
    before, after = mean_kl(start), mean_kl(end)
    if after > before * (1 + NOISE):
        LOG.warning(
            "The fit ends farther from its sources than it began (mean held-out KL %.4f, %.4f at "
            "the start): lower `dam.learning_rate`, give more data, or keep the start with "
            "`steps: 0`.",
            after,
            before,
        )


def warn_if_kept(start: Sequence[Figures], end: Sequence[Figures]) -> None:
    """Of a fit that was evaluated on the way, whose best is kept."""
    if mean_kl(end) == mean_kl(start):
        LOG.warning(
            "No evaluation of the fit was better than its start, which is kept: lower "
            "`dam.learning_rate`, or give more data."
        )
