"""The fit, from a recipe to the coefficient file."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from torch import Tensor

import mergekit_dam
from mergekit_dam import coefficients as files
from mergekit_dam.config import Recipe, Settings
from mergekit_dam.config.recipe import match_reference
from mergekit_dam.data import SourceData, StepRows, load_rows
from mergekit_dam.errors import DamError
from mergekit_dam.fit.evaluate import evaluate
from mergekit_dam.fit.objective import Distillation
from mergekit_dam.fit.trainer import build_trainer, history, is_main_process, last_checkpoint
from mergekit_dam.formula import coefficient_shape
from mergekit_dam.model import MergedModel, Role, Skeleton, SourceWeights, build_skeleton
from mergekit_dam.plan import Plan, load_tokenizer, plan_merge, plan_source
from mergekit_dam.sources import describe


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
    checkpoint = _checkpoint(folder, _identity(prepared), resume=resume)
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
    needs_base = settings.formula == "task_vectors"
    weights = SourceWeights(plan, needs_base=needs_base, device=device)
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
        average(skeleton, weights, settings, len(plan.sources)),
        trained_tensors(skeleton, settings),
        dtype,
        _teachers(recipe, plan, dtype, device),
    ).to(device)
    return Fit(settings, plan, merged, data, _header(recipe, plan))


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


def average(
    skeleton: Skeleton, weights: SourceWeights, settings: Settings, sources: int
) -> dict[str, Tensor]:
    """The plain average of the sources that have each tensor: output tensor -> [N, *B].

    A source without an optional tensor has zeros there, and keeps them.
    """
    result = {}
    for name in weights.names():
        stack = weights[name]
        # A tensor that the model does not use (its coefficients stay as they are) is a vector
        # or a matrix like any other.
        role = skeleton.roles.get(name, Role("linear", tuple(stack.shape)))
        shape = coefficient_shape(
            stack.shape,
            settings.granularity,
            input_axis=role.input_axis,
            bias=role.kind == "bias",
        )
        result[name] = torch.zeros(sources, *shape)
        result[name][list(stack.rows)] = 1 / len(stack.rows)
    return result


def trained_tensors(skeleton: Skeleton, settings: Settings) -> set[str]:
    """The output tensors of the kinds that `dam.train` leaves switched on."""
    return {name for name, role in skeleton.roles.items() if getattr(settings.train, role.kind)}


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


def _header(recipe: Recipe, plan: Plan) -> files.Header:
    settings, merge = recipe.settings, recipe.merge
    tokenizer = merge.tokenizer or merge.tokenizer_source
    if hasattr(tokenizer, "model_dump"):
        tokenizer = tokenizer.model_dump(mode="json", exclude_none=True)
    return files.Header(
        package=mergekit_dam.__version__,
        formula=settings.formula,
        granularity=settings.granularity,
        sources=tuple(describe(source) for source in plan.sources),
        base=describe(plan.base) if settings.formula == "task_vectors" else None,
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


def _checkpoint(folder: Path, identity: dict[str, Any], *, resume: bool) -> str | None:
    """The checkpoint to go on from. Raises DamError rather than lose or mix up an earlier fit."""
    record = folder / "fit.json"
    last = last_checkpoint(folder)
    if last is not None and not resume:
        raise DamError(
            f"{folder} holds checkpoints of a fit that was interrupted: continue it with "
            "--resume, or remove the folder to start over."
        )
    if last is not None:
        earlier = json.loads(record.read_text(encoding="utf-8"))
        changed = sorted(key for key in identity if identity[key] != earlier.get(key))
        if changed:
            raise DamError(
                f"{folder} was begun with other settings ({', '.join(changed)}): restore them to "
                "resume, or remove the folder to start over."
            )
        return last
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(identity), encoding="utf-8")
    return None


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
