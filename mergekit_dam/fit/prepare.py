"""From a recipe to a fit of which everything is loaded and nothing is trained."""

import functools
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click
import datasets
import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from torch import Tensor

import mergekit_dam
from mergekit_dam import coefficients as files
from mergekit_dam.compatible import require_one_config
from mergekit_dam.config import Recipe, Settings, tokenizer_of
from mergekit_dam.data import SourceData
from mergekit_dam.fit.device import choose_device, choose_dtype, choose_threads, take
from mergekit_dam.fit.forecast import Forecast, Outline, merged_skeleton
from mergekit_dam.fit.memory import Needs
from mergekit_dam.fit.place import Place, require_memory
from mergekit_dam.fit.processes import is_main
from mergekit_dam.fit.resume import digest, identity
from mergekit_dam.fit.rows import load_data
from mergekit_dam.fit.start import choose_start, prepare_as, start, trained_tensors
from mergekit_dam.headers import HeaderShapes
from mergekit_dam.model import MergedModel, Offload, Skeleton, SourceWeights, build_skeleton
from mergekit_dam.plan import Plan, plan_merge, plan_source
from mergekit_dam.sources import describe
from mergekit_dam.task_vectors import Preparation


@dataclass(frozen=True)
class Fit:
    """A prepared fit: everything is loaded, nothing is trained."""

    settings: Settings
    plan: Plan
    merged: MergedModel
    data: list[SourceData]
    identity: dict[str, Any]  # see `resume.identity`
    header: files.Header  # without results
    needs: Needs  # of a step
    place: Place

    @functools.cached_property
    def known_tokens(self) -> list[Tensor | None]:
        """Of each source that teaches, see `Plan.known_tokens`."""
        return [self.plan.known_tokens(source) for source in self.plan.teachers]


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
    take(device)
    if options.quiet:
        datasets.disable_progress_bars()
    gc.collect()  # an earlier fit of this process: blocks and their model hold each other
    plan = plan_merge(recipe.merge, options, settings.formula, use_base=settings.use_base)
    settings = _resolved(settings, plan)
    require_one_config(recipe.merge, options)
    choose_threads(plan.model_config, device, options.num_threads)
    if data is None:
        data = load_data(recipe, plan, out or recipe.coefficients, device)
    found = _require_memory(plan, settings, device, data)
    for sentence in found.place.told:
        _say(sentence, options)
    preparation = prepare_as(plan, settings)
    merged = _merged(recipe, plan, settings, preparation, device, found.place)
    header = _header(recipe, settings, plan, preparation)
    same = identity(header, data, merged.dtype, plan.base and describe(plan.base))
    header = header.model_copy(update={"identity": digest(same)})
    return Fit(settings, plan, merged, data, same, header, found.needs, found.place)


def _resolved(settings: Settings, plan: Plan) -> Settings:
    """With what the defaults come to here, as the file will have it."""
    resolved = {"start": choose_start(settings, plan), "use_base": plan.has_base}
    if resolved["start"] == "least_squares":
        resolved["calibration"] = settings.calibration_rows
    return settings.model_copy(update=resolved)


def _require_memory(
    plan: Plan, settings: Settings, device: str, data: Sequence[SourceData]
) -> Forecast:
    """What the fit will need; raises DamError where that is not there."""
    shapes = HeaderShapes(plan)
    outline = Outline(plan, shapes, merged_skeleton(plan, shapes), device, data)
    found = outline.foresee(settings)
    require_memory(found.place, settings, outline.place)
    return found


def _merged(
    recipe: Recipe,
    plan: Plan,
    settings: Settings,
    preparation: Preparation | None,
    device: str,
    place: Place,
) -> MergedModel:
    """The merged model at its start, with everything loaded."""
    weights = SourceWeights(
        plan,
        needs_base=settings.formula == "task_vectors",
        preparation=preparation,
        device=device,
        offload=place.offload,
    )
    dtype = choose_dtype(settings, weights.dtypes(), device)
    skeleton = skeleton_of(plan, weights, dtype)
    coefficients = start(plan, skeleton, weights, settings)
    teachers = own_models(recipe, plan, dtype, device, place.offload)
    trained = trained_tensors(skeleton, settings)
    merged = MergedModel(skeleton, weights, coefficients, trained, dtype, teachers).to(device)
    merged.recompute = place.recompute
    return merged


def _say(sentence: str, options: MergeOptions) -> None:
    if sentence and not options.quiet and is_main():
        click.echo(sentence, err=True)


def own_models(
    recipe: Recipe, plan: Plan, dtype: torch.dtype, device: str, offload: Offload = "none"
) -> dict[int, MergedModel]:
    """The sources that the merge's skeleton cannot speak for (layers cut out, repeated or
    stacked): each the whole model as it is."""
    return {
        number: own_model(source, recipe, plan, dtype, device, offload)
        for number, source in enumerate(plan.teachers)
        if source in plan.models_of_their_own
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
    return MergedModel(skeleton_of(own, weights, dtype), weights, {}, set(), dtype)


def skeleton_of(plan: Plan, weights: SourceWeights, dtype: torch.dtype) -> Skeleton:
    """Raises DamError where the model cannot be built."""
    trusts = plan.options.trust_remote_code
    names = frozenset(weights.names())
    return build_skeleton(plan.model_config, names, dtype=dtype, trust_remote_code=trusts)


def _header(
    recipe: Recipe, settings: Settings, plan: Plan, preparation: Preparation | None
) -> files.Header:
    return files.Header(
        package=mergekit_dam.__version__,
        formula=settings.formula,
        granularity=settings.granularity if isinstance(settings.granularity, str) else "mixed",
        sources=tuple(describe(s, teaches=s in plan.teachers) for s in plan.sources),
        base=describe(plan.base) if settings.formula == "task_vectors" else None,
        preparation=preparation,
        tokenizer=tokenizer_of(recipe.merge),
        settings=settings.model_dump(mode="json", exclude_none=True),
        merge=recipe.mergekit_part,
    )
