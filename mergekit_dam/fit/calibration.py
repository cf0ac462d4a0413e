"""The least-squares start of a fit: its rows, its progress, and going on where it was killed."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mergekit_dam.coefficients import Figures
from mergekit_dam.config import Settings
from mergekit_dam.data import Row, SourceData
from mergekit_dam.fit.processes import is_main
from mergekit_dam.fit.resume import PROGRESS, keep, kept
from mergekit_dam.least_squares import least_squares, split
from mergekit_dam.model import MergedModel

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # of the way from the start to the solution


def calibrate(
    merged: MergedModel,
    data: Sequence[SourceData],
    settings: Settings,
    folder: Path,
    evaluate: Callable[[Sequence[Sequence[Row]]], Sequence[Figures]],  # on rows of each source
    *,
    resume: bool,
    quiet: bool,
) -> None:
    """Solve the trained coefficients of a merged model, block after block, and go as far towards
    the solution as brings the merge nearest to its sources on rows that were not solved for.

    Progress is kept in `folder`; with `resume` the blocks that are done are not solved again, and
    the result is the same. Every process of a distributed fit solves for itself.
    """
    start = {name: c.detach().clone() for name, c in merged.trained_coefficients().items()}
    rows = [source.train[: settings.calibration_rows] for source in data]
    solved = _restore(merged, folder / PROGRESS) if resume else set()
    with tqdm(
        total=len(merged.trained_blocks()), desc="Solving", disable=quiet or not is_main()
    ) as bar:

        def report(done: set[str]) -> None:
            bar.update()
            if is_main() and done - solved:
                coefficients = merged.coefficients()
                keep(folder / PROGRESS, {name: coefficients[name] for name in sorted(done)})

        least_squares(merged, rows, solved=solved, report=report)
    unseen = [split(own)[1] for own in rows]
    _go_as_far_as_helps(merged, start, lambda: sum(f.kl for f in evaluate(unseen)))


def _go_as_far_as_helps(
    merged: MergedModel,
    start: Mapping[str, Tensor],
    divergence: Callable[[], float],
) -> None:
    """Layers that are each nearer to the sources need not make a merge that is."""
    trained = merged.trained_coefficients()
    found = {name: c.detach().clone() for name, c in trained.items()}

    def go(share: float) -> None:
        for name, coefficient in trained.items():
            # At 0 too, `lerp` of what is not finite is not.
            value = torch.lerp(start[name], found[name], share) if share else start[name]
            coefficient.data.copy_(value)

    def divergence_at(share: float) -> float:
        go(share)
        found = divergence()
        return found if math.isfinite(found) else math.inf  # nothing is below a NaN

    go(min(SHARES, key=divergence_at))


def _restore(merged: MergedModel, path: Path) -> set[str]:
    """Set what an interrupted start has solved; nothing where it has left nothing sound."""
    coefficients = merged.coefficients()
    solved, _ = kept(path, coefficients)
    for name, value in solved.items():
        coefficients[name].data.copy_(value)
    return set(solved)
