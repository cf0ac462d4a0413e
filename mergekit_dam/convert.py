"""Coefficients with one number for each source and tensor, to and from mergekit's own configs.

Such a file says no more than `weight` by filters does, so mergekit's `linear` can say it, too.
"""

from collections.abc import Iterator
from typing import Any, get_args

import torch
import yaml
from mergekit.options import MergeOptions
from torch import Tensor

import mergekit_dam
from mergekit_dam.coefficients import CoefficientFile, Header
from mergekit_dam.config import Settings, tokenizer_of
from mergekit_dam.config.recipe import parse_document, read_documents
from mergekit_dam.errors import DamError
from mergekit_dam.fit.start import prepare_as, starting_weights
from mergekit_dam.headers import HeaderShapes
from mergekit_dam.plan import Plan, plan_merge
from mergekit_dam.sources import describe
from mergekit_dam.task_vectors import Sparsify

METHODS = ("linear", *get_args(Sparsify))


def to_linear(file: CoefficientFile) -> str:
    """A `linear` config, as YAML text, that gives the same merge.

    Raises DamError where the file says more than such a config can.
    """
    header = file.header
    if header.preparation is not None:
        raise DamError(
            f"{file.path} is for task vectors sparsified by {header.preparation.method}, which "
            "`linear` does not do: it stays a coefficient file."
        )
    for key in ("slices", "modules"):
        if key in header.merge:
            raise DamError(
                f"{file.path} is for a merge with `{key}`, where one name stands for several "
                "tensors, so filters cannot tell them apart: it stays a coefficient file."
            )
    weights = _numbers(file)
    models = [
        {"model": source.reference, "parameters": {"weight": _filters(weights, row)}}
        for row, source in enumerate(header.sources)
    ]
    document = {key: value for key, value in header.merge.items() if key != "models"}
    document |= {"merge_method": "linear", "models": models, "parameters": {"normalize": False}}
    models += _base(document.get("base_model"), models, weights, header)
    return yaml.safe_dump(document, sort_keys=False, width=1000)


def _numbers(file: CoefficientFile) -> dict[str, list[float]]:
    """Output tensor -> one number for each source; longer names first, so that each name is the
    first filter that matches it."""
    result = {}
    for name in sorted(file.names, key=lambda name: (-len(name), name)):
        values = file.get(name).reshape(len(file.header.sources), -1)
        if (values != values[:, :1]).any():
            raise DamError(
                f"{file.path}: {name} has several coefficients for each source, which `linear` "
                "cannot express: fit with `granularity: tensor` for a file that converts."
            )
        result[name] = values[:, 0].tolist()
    return result


def _filters(weights: dict[str, list[float]], row: int) -> Any:
    given = {numbers[row] for numbers in weights.values()}
    if len(given) == 1:
        return given.pop()
    return [{"filter": name, "value": numbers[row]} for name, numbers in weights.items()]


def _base(
    base: str | None, models: list[dict], weights: dict[str, list[float]], header: Header
) -> list[dict]:
    """The base as one more model: 1 - Σ c_i under task vectors, else 0; and 1 in tensors that it
    alone has, which come as they are."""
    if base is None or base in [model["model"] for model in models]:
        return []
    subtracts = header.formula == "task_vectors"
    rest = {name: 1 - sum(c) if subtracts else 0.0 for name, c in weights.items()}
    filters = [{"filter": name, "value": value} for name, value in rest.items()]
    return [{"model": base, "parameters": {"weight": [*filters, {"value": 1.0}]}}]


def from_config(path: str, options: MergeOptions) -> tuple[dict[str, Tensor], Header]:
    """The coefficients that a config of `linear`, or of a method on task vectors, amounts to.

    The weights are read once, a tensor at a time, for their names and axes. Raises DamError for a
    config of another method, and for models that cannot be merged.
    """
    documents = read_documents(path)
    method = documents[0][0].get("merge_method")
    if len(documents) > 1 or method not in METHODS:
        raise DamError(
            f"{path}: merge_method is {method!r}, and coefficients can be made of one merge by "
            f"{', '.join(METHODS)}."
        )
    recipe = parse_document(path, _as_dam(documents[0][0]), documents[0][1])
    if recipe.problems:
        raise DamError(f"{path}: " + "; ".join(recipe.problems) + ".")
    settings = Settings(data=(), granularity="tensor", **_formula(method))
    plan = plan_merge(recipe.merge, options, settings.formula)
    if problems := list(HeaderShapes(plan).problems()):
        raise DamError(f"{path}: {problems[0]}.")
    tensors = {}
    for name, rows, axes in _present(plan):
        values = torch.zeros(len(plan.sources))
        values[rows] = torch.tensor(starting_weights(plan, name, rows, settings))
        tensors[name] = values.reshape(-1, *(1,) * axes)
    header = Header(
        package=mergekit_dam.__version__,
        formula=settings.formula,
        granularity="tensor",
        sources=tuple(describe(source) for source in plan.sources),
        base=describe(plan.base) if settings.formula == "task_vectors" else None,
        preparation=prepare_as(plan, settings),
        tokenizer=tokenizer_of(recipe.merge),
        merge=recipe.mergekit_part,
        origin=f"a config of {method}",
    )
    return tensors, header


def _as_dam(document: dict) -> dict:
    """The same merge by `dam`. mergekit counts a base that is not listed among the inputs of
    `linear`, and `dam` does not: so it is listed."""
    models, base = document.get("models"), document.get("base_model")
    if document["merge_method"] == "linear" and base and isinstance(models, list):
        if base not in [m.get("model") for m in models if isinstance(m, dict)]:
            models = [*models, {"model": base}]
        document = {**document, "models": models}
    return {**document, "merge_method": "dam"}


def _formula(method: str) -> dict[str, str]:
    return {} if method == "linear" else {"formula": "task_vectors", "sparsify": method}


def _present(plan: Plan) -> Iterator[tuple[str, list[int], int]]:
    """(name, the sources that have it, its number of axes) for each tensor that is merged."""
    for name, inputs in plan.load(plan.tensors):
        rows = [row for row, source in enumerate(plan.sources) if source in inputs]
        first = inputs[plan.sources[rows[0]]] if rows else None
        if first is not None and first.is_floating_point():
            yield name, rows, first.ndim
