"""The fit, from a recipe to the coefficient file."""

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

import mergekit_dam
from mergekit_dam import coefficients as files
from mergekit_dam.config import Recipe, Settings
from mergekit_dam.config.recipe import match_reference
from mergekit_dam.data import SourceData, StepRows, load_rows
from mergekit_dam.errors import DamError
from mergekit_dam.fit.evaluate import evaluate
from mergekit_dam.fit.objective import Distillation
from mergekit_dam.fit.resume import find_checkpoint
from mergekit_dam.fit.start import prepare_as, start, trained_tensors
from mergekit_dam.fit.trainer import build_trainer, history, is_main_process
from mergekit_dam.model import MergedModel, SourceWeights, build_skeleton
from mergekit_dam.plan import Plan, load_tokenizer, plan_merge, plan_source
from mergekit_dam.sources import describe
from mergekit_dam.task_vectors import Preparation


@dataclass(frozen=True)
class Fit:
    """A prepared fit: everything is loaded, nothing is trained."""

    settings: Settings
    plan: Plan
    merged: MergedModel
    data: list[SourceData]
    header: files.Header  # its results are empty


def fit(
    recipe: Recipe,
    out: str,
    options: MergeOptions,
    *,
    device: str = "auto",
    resume: bool = False,
) -> files.Header:
    """Fit the coefficients of a recipe, write them to `out` and return the file's header.

    Killed at any moment and called again with `resume`, it ends with the same coefficients.
    Raises DamError for every mistake of the user's.
    """
    folder = Path(f"{out}.fit")
    prepared = prepare(recipe, options, device=device)
    if resume and is_fitted(out, prepared.header):
        return files.open_file(out).header
    checkpoint = find_checkpoint(folder, _identity(prepared), resume=resume)
    header = _train(prepared, folder, checkpoint, quiet=options.quiet)
    if is_main_process():
        files.save(out, prepared.merged.coefficients(), header)
        shutil.rmtree(folder, ignore_errors=True)
    return header


def prepare(recipe: Recipe, options: MergeOptions, *, device: str = "auto") -> Fit:
    """Plan the merge, read data and weights, build the merged model at its start."""
    settings, device = recipe.settings, _device(device)
    if options.quiet:
        datasets.disable_progress_bars()
    plan = plan_merge(recipe.merge, options, settings.formula)
    data = load_data(settings, plan)
    preparation = prepare_as(plan, settings)
    weights = SourceWeights(
        plan,
        needs_base=settings.formula == "task_vectors",
        preparation=preparation,
        device=device,
    )
    dtype = _compute_dtype(settings, weights, device)
    skeleton = build_skeleton(
        plan.model_config,
        frozenset(weights.names()),
        dtype=dtype,
        trust_remote_code=options.trust_remote_code,
    )
    merged = MergedModel(
        skeleton,
        weights,
        start(plan, skeleton, weights, settings),
        trained_tensors(skeleton, settings),
        dtype,
        _teachers(recipe, plan, dtype, device),
    ).to(device)
    return Fit(settings, plan, merged, data, _header(recipe, plan, preparation))


def _teachers(
    recipe: Recipe, plan: Plan, dtype: torch.dtype, device: str
) -> dict[int, MergedModel]:
    """The sources that the merge's skeleton cannot speak for (layers cut out, repeated or
    stacked): each the whole model as it is."""
    teachers = {}
    for number, source in enumerate(plan.sources):
        if not plan.is_whole(source):
            own = plan_source(plan, source, recipe.merge)
            weights = SourceWeights(own, needs_base=False, device=device)
            names = frozenset(weights.names())
            skeleton = build_skeleton(
                own.model_config,
                names,
                dtype=dtype,
                trust_remote_code=plan.options.trust_remote_code,
            )
            teachers[number] = MergedModel(skeleton, weights, {}, set(), dtype)
    return teachers


def load_data(settings: Settings, plan: Plan) -> list[SourceData]:
    """The rows of every source, in the sources' order."""
    entries = {match_reference(entry.source, plan.sources): entry for entry in settings.data}
    for source in plan.sources:
        if source not in entries:
            raise DamError(f"`dam.data` has no entry for the source {source}: add one.")
    data = []
    for source in plan.sources:
        own = load_tokenizer(source, plan.options)
        data.append(load_rows(entries[source], settings, plan.tokenizer, own))
        _require_known(data[-1], plan, source)
    return data


def _require_known(data: SourceData, plan: Plan, source: ModelReference) -> None:
    """A token id beyond the embedding would read foreign memory."""
    size = plan.model_config.get_text_config().vocab_size
    highest = max(max(row) for row in (*data.train, *data.held_out))
    if highest >= size:
        raise DamError(
            f"The data of {source} has the token id {highest}, but the merged model's vocabulary "
            f"has {size} tokens: give the merge a `tokenizer` that fits, for example "
            "`tokenizer: {source: union}`."
        )


def is_fitted(out: str, header: files.Header) -> bool:
    """Whether `out` is the finished result of this very fit."""
    if not Path(out).exists():
        return False
    done = files.open_file(out).header
    return done.model_copy(update={"results": {}}) == header


def _train(prepared: Fit, folder: Path, checkpoint: str | None, *, quiet: bool) -> files.Header:
    settings, merged = prepared.settings, prepared.merged
    held_out = [source.held_out for source in prepared.data]
    known = [prepared.plan.known_tokens(source) for source in prepared.plan.sources]
    with merged.as_average():
        before = evaluate(merged, held_out, settings.batch_size, known)
    losses: list[dict[str, Any]] = []
    if settings.max_steps:
        trainer = build_trainer(
            Distillation(merged, settings.objective, known),
            StepRows(prepared.data),
            settings,
            folder,
            device=merged.device.type,
            quiet=quiet,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        losses = history(trainer)
    _require_finite(merged, folder)
    after = evaluate(merged, held_out, settings.batch_size, known)
    results = {
        "average": [asdict(figures) for figures in before],
        "fit": [asdict(figures) for figures in after],
        "history": losses,
    }
    return prepared.header.model_copy(update={"results": results})


def _require_finite(merged: MergedModel, folder: Path) -> None:
    for name, coefficient in merged.coefficients().items():
        if not torch.isfinite(coefficient).all():
            shutil.rmtree(folder, ignore_errors=True)  # nobody can go on from there
            raise DamError(
                f"The coefficients of {name} became NaN or infinite in the fit: lower "
                "`dam.learning_rate`. Nothing was written."
            )


def _header(recipe: Recipe, plan: Plan, preparation: Preparation | None) -> files.Header:
    settings, merge = recipe.settings, recipe.merge
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
    )


def _identity(prepared: Fit) -> dict[str, Any]:
    """All that must be the same for a fit to go on from a checkpoint."""
    settings = prepared.header.settings
    return {
        **{f"dam.{key}": value for key, value in settings.items() if key != "report_to"},
        "sources": [source.model_dump() for source in prepared.header.sources],
        "data": [source.digest() for source in prepared.data],
        "tensors": {n: list(c.shape) for n, c in prepared.merged.coefficients().items()},
    }


def _device(name: str) -> str:
    """Under torchrun each process has a GPU of its own, the one that the Trainer takes too."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise DamError("--device cuda: torch sees no CUDA device here; use --device cpu.")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name


def _compute_dtype(settings: Settings, weights: SourceWeights, device: str) -> torch.dtype:
    if settings.compute_dtype != "auto":
        return getattr(torch, settings.compute_dtype)
    dtypes = {weights[name].dtype for name in weights.names()}
    if device == "cpu" or torch.float32 in dtypes:
        return torch.float32
    return torch.bfloat16
