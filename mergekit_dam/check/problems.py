"""Finds every mistake that can be known without loading weights, all at once."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_dam.check.estimate import Estimate, estimate, misfits
from mergekit_dam.check.files import path_problems
from mergekit_dam.check.fitted import file_problems
from mergekit_dam.check.parameters import (
    doubtful_settings,
    filters_without_a_tensor,
    number_problems,
    parameter_problems,
    range_problems,
)
from mergekit_dam.check.preview import Rows, read_rows, repeated_rows
from mergekit_dam.check.tokens import token_problems
from mergekit_dam.compatible import require_one_config
from mergekit_dam.config import Recipe, Settings
from mergekit_dam.config.data_settings import EVERY
from mergekit_dam.config.recipe import match_reference
from mergekit_dam.data import benchmark_warning, is_missing
from mergekit_dam.errors import DamError
from mergekit_dam.fit.device import choose_device, choose_threads
from mergekit_dam.fit.forecast import Outline, merged_skeleton
from mergekit_dam.fit.processes import launch_problems
from mergekit_dam.fit.start import choose_start, prepare_as, start_problems, starting_weights
from mergekit_dam.fit.trainer import integration_problems
from mergekit_dam.formula import Formula
from mergekit_dam.headers import HeaderShapes, require_files
from mergekit_dam.hub import open_coefficients
from mergekit_dam.nearest import did_you_mean
from mergekit_dam.opening import require_model
from mergekit_dam.plan import Plan, plan_merge, source_models

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
    settings, out = recipe.settings, coefficients or ""
    problems = list(_config_problems(recipe, options, coefficients, device, will_fit=will_fit))
    plan, shapes = _planned(recipe, options, coefficients, problems)
    problems += _plan_problems(recipe, options, plan, shapes, will_fit=will_fit)
    if coefficients and will_merge:
        problems += _file_problems(recipe, plan, shapes, coefficients, will_fit=will_fit)
    rows = read_rows(settings, plan, out) if in_full and settings else Rows()
    problems += rows.problems
    result = None
    if will_fit and not problems:
        problems, result = _foreseen(recipe, plan, shapes, rows, out, device, in_full=in_full)
    if problems:
        raise DamError(listed(recipe.path, problems))
    if will_fit:
        _warn_of(filter(None, map(benchmark_warning, settings.data)))
    return result


def _config_problems(
    recipe: Recipe,
    options: MergeOptions,
    coefficients: str | None,
    device: str,
    *,
    will_fit: bool,
) -> Iterator[str]:
    """What is wrong without a plan. Raises DamError with all of it where none can be made."""
    found = [*recipe.problems, *path_problems(recipe, coefficients, will_fit=will_fit)]
    if will_fit:
        found += _collect(fit_problems(recipe, device))
    no_numbers = list(number_problems(recipe.merge))
    of_models = [*range_problems(recipe.merge), *model_problems(recipe, options)]
    of_models = of_models or list(token_problems(recipe.merge, options))
    found += [*no_numbers, *of_models]
    if of_models or no_numbers:
        raise DamError(listed(recipe.path, found))
    yield from found


def _planned(
    recipe: Recipe, options: MergeOptions, coefficients: str | None, problems: Sequence[str]
) -> tuple[Plan, HeaderShapes]:
    """Raises DamError, with the problems known, where there is no plan, or no whole source."""
    settings = recipe.settings
    try:
        plan = plan_merge(
            recipe.merge,
            options,
            settings.formula if settings else _fitted_formula(coefficients),
            use_base=settings.use_base if settings else None,
        )
        return plan, HeaderShapes(plan)
    except DamError as error:
        raise DamError(listed(recipe.path, [*problems, error.message])) from error


def _fitted_formula(coefficients: str | None) -> Formula:
    """What the file that a config without a `dam:` block reads was fitted for."""
    try:
        return open_coefficients(coefficients).header.formula if coefficients else "weights"
    except DamError:  # which is told by `file_problems`
        return "weights"


def _plan_problems(
    recipe: Recipe, options: MergeOptions, plan: Plan, shapes: HeaderShapes, *, will_fit: bool
) -> Iterator[str]:
    of_shapes = list(_collect(shapes.problems()))
    yield from of_shapes or _refusal(require_one_config, recipe.merge, options)
    if will_fit and recipe.settings is not None:
        yield from _collect(_start_problems(recipe.settings, plan))
    _warn_of(filters_without_a_tensor(recipe.merge, list(plan.tensors)))
    if will_fit and recipe.settings is not None:
        _warn_of(doubtful_settings(recipe.settings, choose_start(recipe.settings, plan)))


def _file_problems(
    recipe: Recipe, plan: Plan, shapes: HeaderShapes, coefficients: str, *, will_fit: bool
) -> Iterator[str]:
    """Of the coefficient file: one that a fit will replace is kept under another name."""
    if will_fit and not os.path.exists(coefficients):
        return
    found = _collect(file_problems(coefficients, recipe.settings, recipe.merge, plan, shapes))
    if will_fit:
        _warn_of(found)
    else:
        yield from found


def _foreseen(
    recipe: Recipe,
    plan: Plan,
    shapes: HeaderShapes,
    rows: Rows,
    out: str,
    device: str,
    *,
    in_full: bool,
) -> "tuple[list[str], Outlook | None]":
    """What in the settings does not fit the model; if nothing, what the fit will need."""
    try:
        skeleton = merged_skeleton(plan, shapes)
        if problems := list(misfits(recipe.settings, shapes, skeleton)):
            return problems, None
        _warn_of(map(_untied, skeleton.untied()))
        if not in_full:
            return [], None
        chosen = choose_device(device)
        choose_threads(plan.model_config, chosen, plan.options.num_threads)
        _warn_of(repeated_rows(recipe.settings, plan, rows))
        outline = Outline(plan, shapes, skeleton, chosen, rows.data)
        return [], Outlook(estimate(outline, recipe.settings, out), tuple(rows.previews))
    except DamError as error:
        return [error.message], None


def _untied(name: str) -> str:
    return (
        f"config.json of the merge ties {name} to another tensor, but a source has its own, so the "
        "merge has: transformers loads what is there, other programs may not; give a `base_model` "
        "that ties none"
    )


def _warn_of(problems: Iterable[str]) -> None:
    for problem in dict.fromkeys(problems):
        LOG.warning("%s.", problem.rstrip("."))


@dataclass(frozen=True)
class Outlook:
    """What a fit without mistakes will need, and what it will read."""

    estimate: Estimate
    previews: tuple[str, ...]  # of each source's rows, where they were read

    def __str__(self) -> str:
        return "\n\n".join([str(self.estimate), *self.previews])


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
                require_files(model)
            except DamError as error:
                yield error.message


def _is_under(path: str, folder: str) -> bool:
    return Path(folder).resolve() in Path(path).resolve().parents


def fit_problems(recipe: Recipe, device: str) -> Iterator[str]:
    settings = recipe.settings
    yield from _refusal(choose_device, device)
    yield from launch_problems()
    if settings is None:
        if not recipe.problems:
            yield (
                "there is no `dam:` block: add one with `data`, one entry for each source "
                "(docs/config.md has all keys)"
            )
        return
    yield from parameter_problems(recipe.merge, settings)
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
        rows = [row for row, model in enumerate(plan.teachers) if model in output.inputs]
        starting_weights(plan, name, rows, settings)
    prepare_as(plan, settings)


def _refusal(require: Callable, *arguments: Any) -> Iterator[str]:
    """What a check has to say that raises."""
    try:
        require(*arguments)
    except DamError as error:
        yield error.message


def _unknown_source(where: str, name: str, models: Iterable[str]) -> str:
    models = list(models)
    hint = did_you_mean(name, models, otherwise=f": they are {', '.join(models)}")
    return f"`{where}` is {name}, which is none of the sources{hint}"
