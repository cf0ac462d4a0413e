"""The steps of a chain of merges: what each was made of, what it waits for, its mistakes."""

import filecmp
import json
import os
from collections.abc import Iterator
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_dam.check import (
    Outlook,
    check,
    fit_problems,
    listed,
    model_problems,
    token_problems,
)
from mergekit_dam.compatible import require_compatible
from mergekit_dam.config import Step
from mergekit_dam.data import files_of
from mergekit_dam.errors import DamError
from mergekit_dam.hub import DEFAULT_NAME
from mergekit_dam.output import INPUTS_RECORD, MERGE_RECORD, is_merged
from mergekit_dam.sources import contents, describe


def check_chain(
    config: str,
    steps: list[Step],
    folder: str,
    options: MergeOptions,
    *,
    device: str,
    in_full: bool = False,
) -> dict[str, Outlook | None]:
    """What is to come of each step whose inputs are there; None for mergekit's own methods, and
    for steps that wait for others.

    Raises one DamError that lists the mistakes of all steps which are known before they begin.
    """
    problems, outlooks = [], {}
    for step in steps:
        found, label = [], label_of(step)
        is_there = step.name is not None and is_merged(f"{folder}/{step.name}")
        begins = not is_there and not waits_for(step, folder)
        try:
            outlooks[label] = _check_step(step, folder, options, device, in_full, begins=begins)
        except DamError as error:
            found += _parts(error.message, step.recipe.path)
        if is_there:
            found += stale(step, f"{folder}/{step.name}")
        problems += [f"{label}: {problem}" for problem in found]
    if problems:
        raise DamError(listed(config, problems))
    return outlooks


def _check_step(
    step: Step, folder: str, options: MergeOptions, device: str, in_full: bool, *, begins: bool
) -> Outlook | None:
    """`begins`: whether all its inputs are there, and it is not."""
    recipe, is_fitted = step.recipe, step.recipe.merge.merge_method == "dam"
    if is_fitted and begins:
        return check(
            recipe,
            options,
            coefficients=recipe.coefficients,
            will_fit=True,
            will_merge=False,
            device=device,
            in_full=in_full,
        )
    problems = list(model_problems(recipe, options, but_under=folder))
    if is_fitted:
        problems += fit_problems(recipe, device)
    if begins and not problems:
        problems += token_problems(recipe.merge, options)
        require_compatible(recipe.merge, options)
    if problems:
        raise DamError(listed(recipe.path, problems))
    return None


def label_of(step: Step) -> str:
    return step.name or "last merge"


def waits_for(step: Step, folder: str) -> list[str]:
    """The names of the steps that it uses and that are not there."""
    models = (model.model.path for model in step.recipe.merge.referenced_models())
    return sorted(
        os.path.relpath(path, folder)
        for path in models
        if Path(folder).resolve() in Path(path).resolve().parents and not is_merged(path)
    )


def _parts(message: str, path: str) -> list[str]:
    """The mistakes in a message of `listed`."""
    first, *others = message.splitlines()
    if others:
        return [line.removeprefix("  - ") for line in others]
    return [first.removeprefix(f"{path}: ")]


def made_of(step: Step) -> dict[str, str]:
    """What identifies the inputs of a step that are there: models, adapters, files of data."""
    merge, settings = step.recipe.merge, step.recipe.settings
    result = {
        str(model): f"{source.weights} {source.config}"
        for model in sorted(merge.referenced_models(), key=str)
        if _is_there(model)
        for source in [describe(model)]
    }
    if settings and merge.merge_method == "dam":
        named = (*(entry.path for entry in settings.data), settings.start)
        for path in filter(None, named):
            if files := files_of(path):
                result[path] = contents(files)
    return result


def _is_there(model: ModelReference) -> bool:
    """Models on the Hub are as they were: a changed one has another revision."""
    return all(os.path.isdir(part.path) for part in (model.model, model.lora) if part)


def stale(step: Step, out: str) -> Iterator[str]:
    """Why a merge that is there is not the step's, as far as its records tell."""
    remedy = "remove it, or give another --intermediate-dir"
    config, inputs = Path(out) / MERGE_RECORD, Path(out) / INPUTS_RECORD
    if config.exists() and config.read_text(encoding="utf-8") != step.recipe.text:
        yield f"{out} is there from another config: {remedy}"
        return
    before = json.loads(inputs.read_text(encoding="utf-8")) if inputs.exists() else {}
    for name, digest in made_of(step).items():
        if before.get(name, digest) != digest:
            yield f"{out} was made of another {name}, which has changed since: {remedy}"
            return
    copy, file = Path(out) / DEFAULT_NAME, step.recipe.coefficients
    is_fitted = step.recipe.merge.merge_method == "dam" and copy.exists()
    if is_fitted and os.path.isfile(file) and not filecmp.cmp(copy, file, shallow=False):
        yield f"{out} was merged with other coefficients than {file} holds now: {remedy}"
