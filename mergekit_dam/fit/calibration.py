"""The least-squares start of a fit: its rows, its progress, and going on where it was killed."""

import os
from collections.abc import Sequence
from pathlib import Path

import safetensors
import safetensors.torch
from tqdm import tqdm

from mergekit_dam.config import Settings
from mergekit_dam.data import SourceData
from mergekit_dam.fit.resume import PROGRESS
from mergekit_dam.fit.trainer import is_main_process
from mergekit_dam.least_squares import least_squares
from mergekit_dam.model import MergedModel


def calibrate(
    merged: MergedModel,
    data: Sequence[SourceData],
    settings: Settings,
    folder: Path,
    *,
    resume: bool,
    quiet: bool,
) -> None:
    """Solve the trained coefficients of a merged model, block after block.

    Progress is kept in `folder`; with `resume` the blocks that are done are not solved again, and
    the result is the same. Every process of a distributed fit solves for itself.
    """
    solved = _restore(merged, folder / PROGRESS) if resume else set()
    with tqdm(
        total=len(merged.trained_blocks()), desc="Solving", disable=quiet or not is_main_process()
    ) as bar:

        def report(path: str, done: set[str]) -> None:
            bar.update()
            if is_main_process() and done - solved:
                _keep(merged, done, folder / PROGRESS)

        rows = [source.train[: settings.calibration] for source in data]
        least_squares(merged, rows, solved=solved, report=report)


def _keep(merged: MergedModel, solved: set[str], path: Path) -> None:
    coefficients = merged.coefficients()
    tensors = {name: coefficients[name].detach().cpu().contiguous() for name in sorted(solved)}
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(safetensors.torch.save(tensors))
    os.replace(temporary, path)


def _restore(merged: MergedModel, path: Path) -> set[str]:
    """Set what an interrupted start has solved; nothing where it has left nothing sound."""
    coefficients = merged.coefficients()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = set(file.keys())
            kept = {
                name: file.get_tensor(name)
                for name in names & coefficients.keys()
                if tuple(file.get_slice(name).get_shape()) == tuple(coefficients[name].shape)
            }
    except (safetensors.SafetensorError, OSError):
        return set()
    if kept.keys() != names:
        return set()
    for name, value in kept.items():
        coefficients[name].data.copy_(value)
    return names
