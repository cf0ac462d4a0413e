"""The fit, from a recipe to the coefficient file."""

import functools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import datasets
import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

import mergekit_dam
from mergekit_dam import coefficients as files
from mergekit_dam.compatible import require_one_config
from mergekit_dam.config import Recipe, Settings
from mergekit_dam.data import SourceData
from mergekit_dam.errors import DamError
from mergekit_dam.fit import teachers
from mergekit_dam.fit.batches import StepRows
from mergekit_dam.fit.calibration import calibrate
from mergekit_dam.fit.device import choose_device, choose_dtype, choose_threads
from mergekit_dam.fit.evaluate import evaluate
from mergekit_dam.fit.memory import (
    choose_offload,
    choose_recompute,
    free_memory,
    longest_step,
    needs,
    require_memory,
    size_of_sources,
)
from mergekit_dam.fit.objective import COMPARISONS, Distillation
from mergekit_dam.fit.resume import digest, discard, discard_empty, find_checkpoint, identity
from mergekit_dam.fit.rows import load_data
from mergekit_dam.fit.start import choose_start, prepare_as, start, trained_tensors
from mergekit_dam.fit.trainer import build_trainer, history, is_main_process
from mergekit_dam.fit.verdict import at_start, warn_if_worse
from mergekit_dam.fit.watch import Watch, watched
from mergekit_dam.model import MergedModel, Offload, SourceWeights, build_skeleton
from mergekit_dam.plan import Plan, plan_merge, plan_source
from mergekit_dam.sources import describe
from mergekit_dam.task_vectors import Preparation

ALMOST_NOTHING = 1_000_000  # bytes


@dataclass(frozen=True)
class Fit:
    """A prepared fit: everything is loaded, nothing is trained."""

    settings: Settings
    plan: Plan
    merged: MergedModel
    data: list[SourceData]
    identity: dict[str, Any]  # see `resume.identity`
    header: files.Header  # without results


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
    folder = Path(f"{out}.fit")
    prepared = prepare(recipe, options, device=device, data=data, out=out)
    if resume and is_fitted(out, prepared.header):
        return files.open_file(out).header
    checkpoint = find_checkpoint(folder, prepared.identity, resume=resume)
    try:
        header = _train(prepared, folder, checkpoint, resume=resume, quiet=options.quiet)
    except (DamError, OSError, RuntimeError) as error:
        discard_empty(folder)
        _blame_sources(prepared)
        raise _in_words(error, folder) from error
    if is_main_process():
        files.save(out, prepared.merged.coefficients(), header)
        discard(folder)
        teachers.discard(_states_of(folder))
    return header


def _blame_sources(prepared: Fit) -> None:
    """A fit that failed over a source that is not sound says so. Only then is it worth the
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
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if isinstance(error, DamError) or shutil.disk_usage(nearest).free > ALMOST_NOTHING:
        return error
    return DamError(
        f"The disk of {nearest} is full: make room and go on with --resume. Earlier checkpoints "
        "and coefficient files are whole."
    )


def prepare(
    recipe: Recipe,
    options: MergeOptions,
    *,
    device: str = "auto",
    data: list[SourceData] | None = None,
    out: str | None = None,
) -> Fit:
    """Plan the merge, read data and weights, build the merged model at its start.

    `out` is the coefficient file, beside which sources keep the data that they write.
    """
    settings, device = recipe.settings, choose_device(device)
    if options.quiet:
        datasets.disable_progress_bars()
    plan = plan_merge(recipe.merge, options, settings.formula)
    settings = settings.model_copy(update={"start": choose_start(settings, plan)})
    require_one_config(recipe.merge, options)
    choose_threads(plan.model_config, device, options.num_threads)
    if data is None:
        data = load_data(recipe, plan, out or recipe.coefficients, device)
    preparation = prepare_as(plan, settings)
    offload, told = choose_offload(
        settings,
        device,
        size_of_sources(plan, settings) if settings.offload == "auto" else 0,
        free_memory(device),
        free_memory("cpu"),
    )
    _say(told, options)
    weights = SourceWeights(
        plan,
        needs_base=settings.formula == "task_vectors",
        preparation=preparation,
        device=device,
        offload=offload,
    )
    dtype = choose_dtype(settings, weights, device)
    skeleton = build_skeleton(
        plan.model_config,
        frozenset(weights.names()),
        dtype=dtype,
        trust_remote_code=options.trust_remote_code,
    )
    found = needs(
        plan.model_config,
        skeleton,
        dtype,
        longest_step(settings, data),
        trust_remote_code=options.trust_remote_code,
    )
    merged = MergedModel(
        skeleton,
        weights,
        start(plan, skeleton, weights, settings),
        trained_tensors(skeleton, settings),
        dtype,
        own_models(recipe, plan, dtype, device, offload),
    ).to(device)
    merged.recompute, told = choose_recompute(settings, found, free_memory(device))
    require_memory(found.of(merged.recompute), free_memory(device), settings, device)
    _say(told, options)
    header = _header(recipe, settings, plan, preparation)
    same = identity(header, data)
    header = header.model_copy(update={"identity": digest(same)})
    return Fit(settings, plan, merged, data, same, header)


def _say(sentence: str, options: MergeOptions) -> None:
    if sentence and not options.quiet and is_main_process():
        click.echo(sentence, err=True)


def own_models(
    recipe: Recipe, plan: Plan, dtype: torch.dtype, device: str, offload: Offload = "none"
) -> dict[int, MergedModel]:
    """The sources that the merge's skeleton cannot speak for (layers cut out, repeated or
    stacked): each the whole model as it is."""
    return {
        number: own_model(source, recipe, plan, dtype, device, offload)
        for number, source in enumerate(plan.sources)
        if not plan.is_whole(source)
    }


def own_model(
    model: ModelReference,
    recipe: Recipe,
    plan: Plan,
    dtype: torch.dtype,
    device: str,
    offload: Offload = "none",
) -> MergedModel:
    """A model as it is, over the merge's vocabulary; it speaks as source number 0."""
    own = plan_source(plan, model, recipe.merge)
    weights = SourceWeights(own, needs_base=False, device=device, offload=offload)
    skeleton = build_skeleton(
        own.model_config,
        frozenset(weights.names()),
        dtype=dtype,
        trust_remote_code=plan.options.trust_remote_code,
    )
    return MergedModel(skeleton, weights, {}, set(), dtype)


def is_fitted(out: str, header: files.Header) -> bool:
    """Whether `out` is the finished result of this very fit."""
    if not Path(out).exists():
        return False
    done = files.open_file(out).header
    return done.model_copy(update={"results": None}) == header


def _train(
    prepared: Fit, folder: Path, checkpoint: str | None, *, resume: bool, quiet: bool
) -> files.Header:
    settings, merged = prepared.settings, prepared.merged
    held_out = [source.held_out for source in prepared.data]
    known = [prepared.plan.known_tokens(source) for source in prepared.plan.sources]
    figures = functools.partial(evaluate, merged, held_out, settings.batch_size, known)
    with merged.as_average():
        before = figures()
    losses, curve = (), ()
    if settings.max_steps and not merged.trained_coefficients():
        raise DamError(
            "`dam.train` leaves no tensor of this model to train: switch a kind on, or set "
            "`steps: 0`."
        )
    beginning = before
    if settings.start == "least_squares" and checkpoint is None:
        calibrate(merged, prepared.data, settings, folder, known, resume=resume, quiet=quiet)
    if settings.max_steps:
        if checkpoint is None:
            beginning = at_start(merged.coefficients(), before, figures)
        rows = StepRows(prepared.data)
        trainer = build_trainer(
            Distillation(merged, settings.objective, known, _teachers(prepared, rows, folder)),
            rows,
            settings,
            folder,
            device=merged.device.type,
            quiet=quiet,
            sources=[str(source) for source in prepared.plan.sources],
        )
        if settings.evaluate_every:
            trainer.add_callback(Watch(trainer, settings.evaluate_every, figures))
        trainer.train(resume_from_checkpoint=checkpoint)
        losses, curve = history(trainer), watched(trainer, len(held_out))
    _require_finite(merged, folder)
    after = figures()
    if settings.max_steps and is_main_process():
        warn_if_worse(beginning, after)
    results = files.Results(average=before, fit=after, history=losses, held_out=curve)
    return prepared.header.model_copy(update={"results": results})


def _teachers(prepared: Fit, rows: StepRows, folder: Path) -> teachers.KeptTeachers | None:
    """None: they teach live."""
    settings = prepared.settings
    if settings.teacher == "live" or not any(
        getattr(settings.objective, name) for name in COMPARISONS
    ):
        return None
    kept = teachers.KeptTeachers(prepared.merged, _states_of(folder), _teaching(prepared))
    kept.keep(teachers.rows_of_a_fit(rows, settings, int(os.environ.get("WORLD_SIZE", "1"))))
    return kept


def _states_of(folder: Path) -> Path:
    return folder.with_suffix(".teachers")


def _teaching(prepared: Fit) -> str:
    """What the sources' states depend on, besides the rows."""
    own = {k: v for k, v in prepared.identity.items() if not k.startswith("dam.")}
    return digest({**own, "dtype": str(prepared.merged.dtype)})


def _require_finite(merged: MergedModel, folder: Path) -> None:
    """Coefficients that a fit ends with; a loss on the way is the trainer's to watch."""
    for name, coefficient in merged.coefficients().items():
        if not torch.isfinite(coefficient).all():
            discard(folder)  # nobody can go on from there
            raise DamError(
                f"The coefficients of {name} became NaN or infinite in the fit: lower "
                "`dam.learning_rate`. Nothing was written."
            )


def _header(
    recipe: Recipe, settings: Settings, plan: Plan, preparation: Preparation | None
) -> files.Header:
    merge = recipe.merge
    tokenizer = merge.tokenizer or merge.tokenizer_source
    if hasattr(tokenizer, "model_dump"):
        tokenizer = tokenizer.model_dump(mode="json", exclude_none=True)
    return files.Header(
        package=mergekit_dam.__version__,
        formula=settings.formula,
        granularity=settings.granularity if isinstance(settings.granularity, str) else "mixed",
        sources=tuple(describe(source) for source in plan.sources),
        base=describe(plan.base) if settings.formula == "task_vectors" else None,
        preparation=preparation,
        tokenizer=tokenizer,
        settings=settings.model_dump(mode="json", exclude_none=True),
        merge=recipe.mergekit_part,
    )
