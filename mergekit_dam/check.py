"""Finds every mistake that can be known without loading weights, all at once."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.config import Recipe
from mergekit_dam.config.recipe import match_reference, unknown_key
from mergekit_dam.config.settings import Settings
from mergekit_dam.data import is_local
from mergekit_dam.errors import DamError
from mergekit_dam.fingerprint import read_header
from mergekit_dam.formula import coefficient_shape
from mergekit_dam.model import Skeleton, build_skeleton
from mergekit_dam.plan import Plan, plan_merge, source_models
from mergekit_dam.sources import match

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Estimate:
    """What a merge needs; bytes."""

    sources: int
    output_tensors: int
    trained_tensors: int
    coefficients: int  # numbers in the file
    trained: int  # of them trained
    weights: int  # of all sources together
    activations: int  # of a step
    file: int

    def __str__(self) -> str:
        return (
            f"{self.sources} sources, {self.output_tensors} output tensors, "
            f"{self.trained_tensors} of them with trained coefficients\n"
            f"{self.coefficients:,} coefficients, {self.trained:,} of them trained\n"
            f"memory: weights {_size(self.weights)}, activations about {_size(self.activations)}; "
            f"coefficient file {_size(self.file)}"
        )


def check(
    recipe: Recipe,
    options: MergeOptions,
    *,
    coefficients: str | None = None,
    will_fit: bool = True,
) -> Estimate | None:
    """Raise one DamError that lists all mistakes; else the estimate (None without a fit).

    `coefficients` is the file that the fit will write (`will_fit`) or that the merge will read.
    """
    problems = list(recipe.problems)
    settings = recipe.settings
    if settings is None and not recipe.problems:
        settings = None if not will_fit else _missing_block(problems)
    problems += _collect(lambda: _data_problems(recipe, settings) if settings and will_fit else ())
    if coefficients is None:
        problems.append(
            "`parameters.coefficients` is missing: it is the path of the file that the fit "
            "writes and the merge reads"
        )
    estimate = None
    plan = _plan(recipe, options, settings, problems)
    if plan is not None:
        shapes = _HeaderShapes(plan)
        problems += shapes.problems()
        if not will_fit and coefficients is not None:
            problems += _collect(lambda: _file_problems(coefficients, plan, shapes))
        if settings is not None and will_fit and not problems:
            estimate = _estimate(plan, settings, shapes, problems)
    if problems:
        raise DamError(_listed(recipe.path, problems))
    return estimate


def _listed(path: str, problems: list[str]) -> str:
    problems = [problem.rstrip(".") + "." for problem in dict.fromkeys(problems)]
    if len(problems) == 1:
        return f"{path}: {problems[0]}"
    return f"{path} has {len(problems)} mistakes:\n" + "\n".join(f"  - {p}" for p in problems)


def _missing_block(problems: list[str]) -> None:
    problems.append(
        "there is no `dam:` block: add one with `data`, one entry for each source "
        "(docs/config.md has all keys)"
    )


def _collect(find: Callable) -> list[str]:
    try:
        return list(find())
    except DamError as error:
        return [error.message]


def _plan(
    recipe: Recipe, options: MergeOptions, settings: Settings | None, problems: list[str]
) -> Plan | None:
    formula = settings.formula if settings else "weights"
    try:
        return plan_merge(recipe.merge, options, formula)
    except DamError as error:
        problems.append(error.message)
        return None


def _data_problems(recipe: Recipe, settings: Settings) -> Iterator[str]:
    models = source_models(recipe.merge, settings.formula)
    found = []
    for index, entry in enumerate(settings.data):
        where = f"dam.data.{index}"
        model = match_reference(entry.source, models)
        if model is None:
            hint = unknown_key(entry.source, map(str, models)).partition(",")[2]
            yield f"`{where}.source` is {entry.source}, which is none of the sources" + (
                f",{hint}" if hint else f" ({', '.join(map(str, models))})"
            )
        elif model in found:
            yield f"`{where}` is a second entry for the source {model}: keep one"
        found.append(model)
        if is_local(entry.path) and not os.path.exists(entry.path):
            yield f"`{where}.path`: the data file {entry.path} does not exist"
    for model in models:
        if model not in found:
            yield f"`dam.data` has no entry for the source {model}: add one"


def _file_problems(path: str, plan: Plan, shapes: "_HeaderShapes") -> Iterator[str]:
    """A coefficient file against the plan of the merge that shall read it."""
    file = CoefficientFile(path)
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
        yield f"{path} has coefficients for {name}, which this merge does not write: fit them again"
    for name in sorted(expected & file.names):
        file.get(name)
        if (shape := shapes.shape(name)) is not None:
            file.check_shape(name, shape)


def _estimate(
    plan: Plan, settings: Settings, shapes: "_HeaderShapes", problems: list[str]
) -> Estimate | None:
    try:
        skeleton = build_skeleton(
            plan.model_config,
            set(shapes.names()),
            trust_remote_code=plan.options.trust_remote_code,
        )
    except DamError as error:
        problems.append(error.message)
        return None
    counts = {
        name: prod(_coefficient_shape(name, skeleton, settings)) * len(plan.sources)
        for name in skeleton.roles
    }
    trained = {n for n, role in skeleton.roles.items() if getattr(settings.train, role.kind)}
    return Estimate(
        sources=len(plan.sources),
        output_tensors=len(counts),
        trained_tensors=len(trained),
        coefficients=sum(counts.values()),
        trained=sum(counts[name] for name in trained),
        weights=shapes.bytes(),
        activations=_activations(plan, settings),
        file=4 * sum(counts.values()),
    )


def _coefficient_shape(name: str, skeleton: Skeleton, settings: Settings) -> tuple[int, ...]:
    role = skeleton.roles[name]
    return coefficient_shape(
        role.shape, settings.granularity, input_axis=role.input_axis, bias=role.kind == "bias"
    )


def _activations(plan: Plan, settings: Settings) -> int:
    """Rows of full length: each block's input, and the logits of merge and teacher with their
    log-probabilities and gradient, in float32."""
    config = plan.model_config.get_text_config()
    tokens = settings.batch_size * len(plan.sources) * settings.max_length
    hidden = tokens * config.hidden_size * (config.num_hidden_layers + 8)
    return 4 * (hidden + 4 * tokens * config.vocab_size)


class _HeaderShapes:
    """Shapes and sizes of the sources' tensors, from the headers of safetensors files alone."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._models = {model: _headers(model) for model in plan.sources}

    def names(self) -> Iterator[str]:
        """Output tensors that some source has."""
        return (name for name in self._plan.tensors if self._entries(name) or self._unknown(name))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None where the merge changes it (aligned vocabularies, converted layouts)."""
        if self._is_aligned(name):
            return None
        shapes = {tuple(entry["shape"]) for entry in self._entries(name).values()}
        return shapes.pop() if len(shapes) == 1 else None

    def bytes(self) -> int:
        return sum(
            prod(entry["shape"]) * BYTES.get(entry["dtype"], 1)
            for name in self._plan.tensors
            for entry in self._entries(name).values()
        )

    def problems(self) -> Iterator[str]:
        for name, output in self._plan.tensors.items():
            entries = self._entries(name)
            shapes = {tuple(entry["shape"]) for entry in entries.values()}
            if len(shapes) > 1 and not self._is_aligned(name):
                remedy = "choose models of one architecture and size"
                if output.vocabulary_axis is not None:
                    remedy = "align the vocabularies, for example `tokenizer: {source: union}`"
                listed = ", ".join(f"{model} {e['shape']}" for model, e in entries.items())
                yield f"the sources' shapes of {name} differ ({listed}): {remedy}"
                return  # the other tensors differ for the same reason

    def _entries(self, name: str) -> dict[ModelReference, dict]:
        inputs = self._plan.tensors[name].inputs
        return {
            model: entry
            for model, headers in self._models.items()
            if headers is not None and model in inputs
            for entry in [next((headers[n] for n in inputs[model] if n in headers), None)]
            if entry is not None
        }

    def _unknown(self, name: str) -> bool:
        """No header tells (a `.bin` file, a converted layout), but the merge needs the tensor."""
        return not self._plan.tensors[name].optional

    def _is_aligned(self, name: str) -> bool:
        return self._plan.tensors[name].is_aligned


def _headers(model: ModelReference) -> dict[str, dict] | None:
    index = LoaderCache().get(model).index
    if not index.is_safetensors:
        return None
    result: dict[str, dict] = {}
    for shard in index.shards:
        path = Path(index.base_path) / shard.filename
        with path.open("rb") as file:
            result |= read_header(file, path)
    result.pop("__metadata__", None)
    return result


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
