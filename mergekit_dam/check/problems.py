"""Finds every mistake that can be known without loading weights, all at once."""

import difflib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_dam.check.estimate import Estimate, estimate, merged_skeleton, misfits
from mergekit_dam.check.files import path_problems
from mergekit_dam.check.headers import HeaderShapes
from mergekit_dam.check.preview import preview
from mergekit_dam.check.tokens import token_problems
from mergekit_dam.compatible import require_one_config
from mergekit_dam.config import Recipe, Settings
from mergekit_dam.config.recipe import match_reference
from mergekit_dam.config.settings import EVERY
from mergekit_dam.data import benchmark_warning, is_missing
from mergekit_dam.errors import DamError
from mergekit_dam.fit.device import choose_device
from mergekit_dam.fit.rows import generation, load_source_data
from mergekit_dam.fit.start import start_problems, starting_weights
from mergekit_dam.fit.trainer import integration_problems
from mergekit_dam.hub import open_coefficients
from mergekit_dam.plan import Plan, plan_merge, require_model, source_models
from mergekit_dam.sources import match

LOG = logging.getLogger(__name__)


def check(
    recipe: Recipe,
    options: MergeOptions,
    *,
    coefficients: str | None,
    will_fit: bool,
    will_merge: bool,
    device: str = "auto",
    in_full: bool = False,
) -> "Outlook | None":
    """Raise one DamError that lists all mistakes.

    `coefficients` is the file that the fit writes (`will_fit`) or the merge reads
    (`will_merge`); with both it is compared with the config where it exists already. With
    `in_full` the rows are read and tokenised, too, which a fit does itself before it loads weights,
    and what a fit will need is returned.
    """
    problems, settings = list(recipe.problems), recipe.settings
    problems += path_problems(recipe, coefficients, will_fit=will_fit)
    of_fit = list(_collect(fit_problems(recipe, device))) if will_fit else []
    problems += of_fit
    of_models = list(model_problems(recipe, options))
    of_models = of_models or list(token_problems(recipe.merge, options))
    problems += of_models
    if of_models:
        raise DamError(listed(recipe.path, problems))  # nothing can be planned
    try:
        plan = plan_merge(recipe.merge, options, settings.formula if settings else "weights")
    except DamError as error:
        raise DamError(listed(recipe.path, [*problems, error.message])) from error
    try:
        shapes = HeaderShapes(plan)
    except DamError as error:
        raise DamError(listed(recipe.path, [*problems, error.message])) from error
    problems += list(_collect(shapes.problems())) or _collect(_config_problems(recipe, options))
    if will_fit and settings is not None:
        problems += _collect(_start_problems(settings, plan))
    if coefficients and will_merge and (not will_fit or os.path.exists(coefficients)):
        problems += _collect(_file_problems(coefficients, settings, plan, shapes))
    previews = []
    if in_full and settings is not None and not of_fit:
        previews = list(_previews(settings, plan, coefficients or "", problems))
    result = None
    if will_fit and not problems:
        try:
            skeleton = merged_skeleton(plan, shapes)
            problems += misfits(settings, shapes, skeleton)
            if in_full:
                found = estimate(plan, settings, shapes, skeleton, choose_device(device))
                result = Outlook(found, tuple(previews))
        except DamError as error:
            problems.append(error.message)
    if problems:
        raise DamError(listed(recipe.path, problems))
    if will_fit:
        warn_of_benchmarks(settings)
    return result


@dataclass(frozen=True)
class Outlook:
    """What a fit without mistakes will need, and what it will read."""

    estimate: Estimate
    previews: tuple[str, ...]  # of each source's rows, where they were read

    def __str__(self) -> str:
        return "\n\n".join([str(self.estimate), *self.previews])


def warn_of_benchmarks(settings: Settings) -> None:
    for warning in filter(None, map(benchmark_warning, settings.data)):
        LOG.warning(warning)


def listed(path: str, problems: list[str]) -> str:
    problems = [p if p.endswith("?") else p.rstrip(".") + "." for p in dict.fromkeys(problems)]
    if len(problems) == 1:
        return f"{path}: {problems[0]}"
    return f"{path} has {len(problems)} mistakes:\n" + "\n".join(f"  - {p}" for p in problems)


def _collect(problems: Iterator[str]) -> Iterator[str]:
    """Up to the first that ends the search, which is the last one."""
    try:
        yield from problems
    except DamError as error:
        yield error.message


def model_problems(
    recipe: Recipe, options: MergeOptions, *, but_under: str | None = None
) -> Iterator[str]:
    """Every model that cannot be opened, not the first alone; `but_under` is a folder whose
    models are yet to be made."""
    LoaderCache().setup(options=options)
    for model in sorted(recipe.merge.referenced_models(), key=str):
        if model.lora is None and not (but_under and _is_under(model.model.path, but_under)):
            try:
                require_model(model, options)
            except DamError as error:
                yield error.message


def _is_under(path: str, folder: str) -> bool:
    return Path(folder).resolve() in Path(path).resolve().parents


def _previews(settings: Settings, plan: Plan, out: str, problems: list[str]) -> Iterator[str]:
    """Each source's rows for a fit into the file `out`; data that are there and cannot be read as
    rows are problems."""
    for source in plan.sources:
        try:
            written = generation(source, settings, plan, out)
            if written and not written.path.exists():
                yield str(written)
                continue
            data = load_source_data(source, settings, plan, out)
            yield preview(str(source), data, plan.tokenizer)
        except DamError as error:
            problems.append(error.message)


def fit_problems(recipe: Recipe, device: str) -> Iterator[str]:
    settings = recipe.settings
    yield from _collect(_device_problems(device))
    if settings is None:
        if not recipe.problems:
            yield (
                "there is no `dam:` block: add one with `data`, one entry for each source "
                "(docs/config.md has all keys)"
            )
        return
    yield from _meaningless(recipe, settings)
    yield from integration_problems(settings.report_to)
    models = source_models(recipe.merge, settings.formula)
    found = []
    for index, entry in enumerate(settings.data):
        model = EVERY if entry.source == EVERY else match_reference(entry.source, models)
        if model is None:
            yield _unknown_source(f"dam.data.{index}.source", entry.source, map(str, models))
        elif model in found:
            yield f"`dam.data.{index}` is a second entry for the source {model}: keep one"
        found.append(model)
        if entry.path is not None and is_missing(entry.path):
            yield f"`dam.data.{index}.path`: the data file {entry.path} does not exist"
    for model in models:
        if model not in found and EVERY not in found:
            yield f"`dam.data` has no entry for the source {model}: add one"


def _start_problems(settings: Settings, plan: Plan) -> Iterator[str]:
    """Weights that give no start, and task vectors without what they subtract."""
    yield from start_problems(settings, plan)
    for name, output in plan.tensors.items():
        if settings.formula == "task_vectors" and plan.base not in output.inputs:
            yield (
                f"`formula: task_vectors` subtracts the base's {name}, but {plan.base} is not "
                "among the inputs of that slice: add it to the slice's `sources`"
            )
            return
        rows = [row for row, model in enumerate(plan.sources) if model in output.inputs]
        starting_weights(plan, name, rows, settings)


def _config_problems(recipe: Recipe, options: MergeOptions) -> Iterator[str]:
    require_one_config(recipe.merge, options)
    yield from ()


def _device_problems(device: str) -> Iterator[str]:
    choose_device(device)
    yield from ()


def _meaningless(recipe: Recipe, settings: Settings) -> Iterator[str]:
    """Parameters of mergekit's methods that this fit would pass over in silence."""
    if settings.sparsify != "task_arithmetic":
        return
    given = {name for part in _parameters(recipe.merge) for name in part or {}}
    for name in sorted(given & {"density", "gamma", "epsilon", "rescale", "int8_mask"}):
        yield (
            f"`{name}` has no effect: set `dam.formula: task_vectors` and `dam.sparsify` to the "
            "method whose parameter it is, or remove it"
        )
    if settings.formula == "weights" and "lambda" in given:
        yield "`lambda` has no effect on `dam.formula: weights`: remove it, or use task_vectors"


def _parameters(merge: MergeConfiguration) -> Iterator[dict | None]:
    yield merge.parameters
    for part in (merge, *(merge.modules or {}).values()):
        yield part.parameters
        for model in part.models or ():
            yield model.parameters
        for piece in part.slices or ():
            yield piece.parameters
            yield from (source.parameters for source in piece.sources)


def _unknown_source(where: str, name: str, models: Iterable[str]) -> str:
    models = list(models)
    nearest = difflib.get_close_matches(name, models, n=1, cutoff=0.5)
    hint = f", did you mean {nearest[0]}?" if nearest else f": they are {', '.join(models)}"
    return f"`{where}` is {name}, which is none of the sources{hint}"


def _file_problems(
    path: str, settings: Settings | None, plan: Plan, shapes: HeaderShapes
) -> Iterator[str]:
    """A coefficient file against the plan of the merge that shall read it."""
    file = open_coefficients(path)
    if settings and settings.formula != file.header.formula:
        yield (
            f"{path} was fitted with `formula: {file.header.formula}`, not "
            f"{settings.formula}: fit it again"
        )
    rows = match(file.header.sources, plan.sources)
    for model, row in zip(plan.sources, rows, strict=True):
        if row is None and model != plan.base:
            fitted = ", ".join(source.reference for source in file.header.sources)
            yield (
                f"{path} was fitted for the sources {fitted}; {model} is not one of them, or has "
                "changed since: fit the coefficients again"
            )
    for row, source in enumerate(file.header.sources):
        if row not in rows:
            yield f"{path} was fitted for {source.reference}, which is not among the models"
    expected = set(shapes.names())
    for name in sorted(expected - file.names)[:3]:
        yield f"{path} has no coefficients for the tensor {name}: fit them with this config"
    for name in sorted(file.names - set(plan.tensors))[:3]:
        yield (
            f"{path} has coefficients for {name}, which this merge does not write: fit them with "
            "this config"
        )
    for name in sorted(expected & file.names):
        file.get(name)
        if (shape := shapes.shape(name)) is not None:
            file.check_shape(name, shape)
