"""The fit, from a recipe to the coefficient file."""

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from mergekit.options import MergeOptions
from safetensors import SafetensorError

from mergekit_dam import coefficients as files
from mergekit_dam.config import Recipe
from mergekit_dam.data import SourceData
from mergekit_dam.errors import DamError, NotFiniteError
from mergekit_dam.fit import processes, teachers
from mergekit_dam.fit.alone import alone
from mergekit_dam.fit.batches import StepRows
from mergekit_dam.fit.calibration import calibrate
from mergekit_dam.fit.causal import require_causal
from mergekit_dam.fit.evaluate import evaluate
from mergekit_dam.fit.interrupt import Interrupt
from mergekit_dam.fit.objective import Distillation
from mergekit_dam.fit.prepare import Fit, prepare
from mergekit_dam.fit.processes import is_main
from mergekit_dam.fit.resume import (
    BEST,
    belongs,
    digest,
    discard,
    discard_empty,
    find_checkpoint,
    folder_of,
    full_disk,
    keep_figures,
    kept_figures,
    require_place,
    states_of,
)
from mergekit_dam.fit.trainer import CoefficientTrainer, build_trainer, history
from mergekit_dam.fit.verdict import at_start, warn_if_worse
from mergekit_dam.fit.watch import Best, Watch, watched
from mergekit_dam.launcher import end_with_launcher
from mergekit_dam.model import MergedModel
from mergekit_dam.places import free_disk, tells_of_full_disk, tidy

ALMOST_NOTHING = 1_000_000  # bytes


def fit(
    recipe: Recipe,
    out: str,
    options: MergeOptions,
    *,
    device: str = "auto",
    resume: bool = False,
    data: list[SourceData] | None = None,
) -> files.Header:
    """Fit the coefficients of a recipe, write them to `out` and return the file's header.

    `data` are rows that take the place of the recipe's. Killed at any moment and called again
    with `resume`, it ends with the same coefficients.
    Raises DamError for every mistake of the user's.
    """
    end_with_launcher()
    with alone(folder_of(out)):
        require_place(folder_of(out), resume=resume)
        if is_main():
            tidy(Path(out))
        prepared = prepare(recipe, options, device=device, data=data, out=out)
        return _fit(prepared, out, resume=resume, quiet=options.quiet)


def _fit(prepared: Fit, out: str, *, resume: bool, quiet: bool) -> files.Header:
    folder = folder_of(out)
    if resume and is_fitted(out, prepared.header):
        if belongs(folder, prepared.identity):  # it was killed when it had written its file
            _discard_all(folder)
        return files.open_file(out).header
    checkpoint = find_checkpoint(folder, prepared.identity, resume=resume)
    with _in_our_words(prepared, folder):
        with Interrupt() as interrupt:
            header = _train(prepared, folder, checkpoint, interrupt, resume=resume, quiet=quiet)
        if is_main():
            files.save(out, prepared.merged.coefficients(), header)
    _discard_all(folder)
    return header


@contextlib.contextmanager
def _in_our_words(prepared: Fit, folder: Path) -> Iterator[None]:
    """A context for the fit of a folder, which tells its errors in sentences and leaves nothing
    that no fit could go on from."""
    try:
        yield
    except (DamError, OSError, RuntimeError, SafetensorError) as error:
        told = _in_words(error, folder)  # before anything makes room
        discard_empty(folder)
        if isinstance(error, NotFiniteError):
            _blame_sources(prepared)
        if told is error:
            raise
        raise told from error


def forget(out: str) -> None:
    """Remove a coefficient file, and whatever a fit of it could go on with. Raises BusyError where
    one is under way."""
    folder = folder_of(out)
    with alone(folder):
        Path(out).unlink(missing_ok=True)
        for kept in (folder, states_of(folder)):
            shutil.rmtree(kept, ignore_errors=True)


def _discard_all(folder: Path) -> None:
    """The teachers' states first: what is left when this is killed tells whose they are."""
    if is_main():
        teachers.discard(states_of(folder))
        discard(folder)


def _blame_sources(prepared: Fit) -> None:
    """Where a source is not sound, say so rather than what came of it. Only then is it worth the
    reading of every weight."""
    found = prepared.merged.not_finite()
    if found is not None:
        number, name = found
        raise DamError(
            f"The source {prepared.plan.sources[number]} holds NaN or infinity in {name}: leave it "
            "out, or download it again."
        )


def _in_words(error: Exception, folder: Path) -> Exception:
    """torch and safetensors tell of a full disk in words of their own."""
    if isinstance(error, DamError):
        return error
    is_full = tells_of_full_disk(error) or free_disk(folder) <= ALMOST_NOTHING
    return full_disk(folder) if is_full else error


def is_fitted(out: str, header: files.Header) -> bool:
    """Whether `out` is the finished result of this very fit; `identity` tells of its settings, but
    for those that change no result."""
    if not Path(out).exists():
        return False
    done = files.open_file(out).header
    return done.model_copy(update={"results": None, "settings": header.settings}) == header


def _train(
    prepared: Fit,
    folder: Path,
    checkpoint: str | None,
    interrupt: Interrupt,
    *,
    resume: bool,
    quiet: bool,
) -> files.Header:
    settings, merged = prepared.settings, prepared.merged
    needs = prepared.needs
    room = {"tokens": needs.tokens, "at_head": needs.widest, "rows": needs.rows}
    figures_on = functools.partial(evaluate, merged, **room, known_tokens=prepared.known_tokens)
    figures = functools.partial(figures_on, [source.held_out for source in prepared.data])
    require_causal(merged)
    with merged.as_average():
        before = figures()
    beginning = kept_figures(folder) if checkpoint else None
    if settings.start == "least_squares" and beginning is None:  # it is measured, so gone to
        calibrate(merged, prepared.data, settings, folder, figures_on, resume=resume, quiet=quiet)
    if settings.max_steps:
        results = _step(
            prepared, folder, checkpoint, interrupt, before, beginning, figures, quiet=quiet
        )
    else:
        _require_finite(merged, folder)
        results = files.Results(average=before, fit=figures())
    return prepared.header.model_copy(update={"results": results})


def _step(
    prepared: Fit,
    folder: Path,
    checkpoint: str | None,
    interrupt: Interrupt,
    average: Sequence[files.Figures],
    beginning: Sequence[files.Figures] | None,  # of the start, where they were kept
    figures: Callable[[], Sequence[files.Figures]],
    *,
    quiet: bool,
) -> files.Results:
    """All steps, from a start or on from a checkpoint."""
    settings, merged = prepared.settings, prepared.merged
    _require_trained(merged)
    if beginning is None:
        beginning = at_start(merged, average, figures)
        keep_figures(folder, beginning)
    trainer = _trainer(prepared, folder, quiet=quiet)
    trainer.add_callback(interrupt)
    watch = Watch(trainer, settings, figures, Best(merged, folder / BEST, resume=bool(checkpoint)))
    watch.train(beginning, checkpoint)
    _require_finite(merged, folder)
    after = watch.end()
    if is_main():
        warn_if_worse(beginning, after)
    return files.Results(
        average=average,
        fit=after,
        history=history(trainer),
        held_out=(files.HeldOut(step=0, kl=[f.kl for f in beginning]), *watched(trainer)),
    )


def _require_trained(merged: MergedModel) -> None:
    if not merged.trained_coefficients():
        raise DamError(
            "`dam.train` leaves no tensor of this model to train: switch a kind on, or set "
            "`steps: 0`."
        )


def _trainer(prepared: Fit, folder: Path, *, quiet: bool) -> CoefficientTrainer:
    settings, rows = prepared.settings, StepRows(prepared.data)
    kept = _teachers(prepared, folder)
    trainer = build_trainer(
        Distillation(prepared.merged, settings.objective, prepared.known_tokens, kept),
        rows,
        settings,
        folder,
        device=prepared.merged.device.type,
        quiet=quiet,
        sources=[str(source) for source in prepared.plan.teachers],
    )
    if kept is not None:
        own = teachers.rows_of_a_fit(rows, settings, processes.count())
        kept.keep(own, trainer.accelerator.wait_for_everyone)
    return trainer


def _teachers(prepared: Fit, folder: Path) -> teachers.KeptTeachers | None:
    """None: they teach live."""
    if prepared.settings.teacher == "live":
        return None
    at_once = prepared.needs.tokens, prepared.needs.rows
    return teachers.KeptTeachers(prepared.merged, states_of(folder), _teaching(prepared), *at_once)


def _teaching(prepared: Fit) -> str:
    """What the sources' states depend on, besides the rows."""
    others = ("contents of the start", "processes")
    same = prepared.identity.items()
    return digest({k: v for k, v in same if not k.startswith("dam.") and k not in others})


def _require_finite(merged: MergedModel, folder: Path) -> None:
    """Coefficients that a fit ends with; a loss on the way is the trainer's to watch."""
    for name, coefficient in merged.coefficients().items():
        if not torch.isfinite(coefficient).all():
            discard(folder)  # nobody can go on from there
            raise NotFiniteError(
                f"The coefficients of {name} became NaN or infinite in the fit: lower "
                "`dam.learning_rate`. Nothing was written."
            )
