"""The merges that are compared, as mergekit's own YAML documents.

Each method has a small grid, of which the candidate with the lowest mean KL on fit rows is taken.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit.common import ModelReference

from mergekit_dam.errors import DamError
from mergekit_dam.plan import Plan

WEIGHTS = (0.1, 0.2, 0.4, 0.7, 1.0)  # of every task vector, for sums
SCALES = (0.2, 0.5, 1.0, 1.5)  # `lambda`, for means
DENSITIES = (0.2, 0.5, 0.8)
NEAR_DENSITIES = (0.3, 0.5, 0.7)  # della's epsilon of 0.15 must fit on both sides
POSITIONS = (0.3, 0.5, 0.7)  # slerp's `t`


@dataclass(frozen=True)
class Candidate:
    chosen: dict[str, Any]  # what distinguishes it from the others of its method
    document: dict[str, Any]  # the YAML


@dataclass(frozen=True)
class Ingredients:
    """What all documents share: the user's own, without what concerns its method."""

    document: dict[str, Any]
    plan: Plan

    @property
    def base(self) -> ModelReference | None:
        return self.plan.base

    @property
    def sources(self) -> tuple[ModelReference, ...]:
        return self.plan.sources

    def require_base(self) -> None:
        if self.base is None or self.base in self.sources:
            raise DamError("it needs a `base_model` that is no source")

    def write(
        self,
        method: str,
        shared: Mapping[str, Any] | None = None,
        each: Mapping[str, Sequence[Any]] | None = None,  # parameter -> one value for each source
        **keys: Any,
    ) -> dict[str, Any]:
        """The document with another method and its parameters."""
        document = {"merge_method": method, **copy.deepcopy(self.document), **keys}
        for entry in inputs(document):
            model = ModelReference.model_validate(entry["model"])
            if model in self.sources and each:
                number = self.sources.index(model)
                entry["parameters"] = {name: values[number] for name, values in each.items()}
        if shared:
            document["parameters"] = dict(shared)
        return document


def ingredients(document: Mapping[str, Any], plan: Plan) -> Ingredients:
    """`document` is a config of `dam`: its models stay, and how they are read."""
    kept = {k: v for k, v in document.items() if k not in ("dam", "parameters", "merge_method")}
    kept = copy.deepcopy(kept)
    for part in (kept, *(kept.get("modules") or {}).values()):
        part.pop("parameters", None)
        if part.get("models"):  # a base that is no source takes part by `base_model` alone
            part["models"] = [e for e in part["models"] if _is_source(e, plan)]
        for piece in part.get("slices") or ():
            piece.pop("parameters", None)
    for entry in inputs(kept):
        entry.pop("parameters", None)
    return Ingredients(kept, plan)


def _is_source(entry: Mapping[str, Any], plan: Plan) -> bool:
    return ModelReference.model_validate(entry["model"]) in plan.sources


def inputs(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every place where a model is named as an input."""
    for part in (document, *(document.get("modules") or {}).values()):
        yield from part.get("models") or ()
        for piece in part.get("slices") or ():
            yield from piece["sources"]


def linear(given: Ingredients) -> Iterator[Candidate]:
    """The plain average, and each source twice as heavy as the others."""
    count = len(given.sources)
    heavier = [[1.0] * i + [2.0] + [1.0] * (count - i - 1) for i in range(count)]
    for weights in [[1.0] * count, *(heavier if count > 1 else [])]:
        # A base that is no source is an input, too: mergekit adds it.
        document = given.write("linear", {"weight": 0.0}, {"weight": weights})
        yield Candidate({"weight": weights}, document)


def slerp(given: Ingredients) -> Iterator[Candidate]:
    if len(given.sources) != 2:
        raise DamError(f"it takes two sources, and there are {len(given.sources)}")
    for t in POSITIONS:
        yield Candidate({"t": t}, given.write("slerp", {"t": t}, **_source_as_base(given)))


def karcher(given: Ingredients) -> Iterator[Candidate]:
    yield Candidate({}, given.write("karcher", **_source_as_base(given)))


def _source_as_base(given: Ingredients) -> dict[str, Any]:
    """These methods take every input for a source, and mergekit makes the base an input; so a
    source gives config and tokenizer."""
    if given.base in given.sources:
        return {}
    if given.base is not None and not given.plan.is_whole(given.sources[0]):
        raise DamError("it takes the config of a source, and those are not the merge's")
    return {"base_model": str(given.sources[0])}


def model_stock(given: Ingredients) -> Iterator[Candidate]:
    given.require_base()
    for filter_wise in (False, True):
        chosen = {"filter_wise": filter_wise}
        yield Candidate(chosen, given.write("model_stock", chosen))


def task_arithmetic(given: Ingredients) -> Iterator[Candidate]:
    for weight in sorted({round(1 / len(given.sources), 4), *WEIGHTS}):
        yield _task_vectors(given, "task_arithmetic", {"weight": weight})


def _grid(method: str, outer: str, values: Sequence[float], densities: Sequence[float]):
    def grid(given: Ingredients) -> Iterator[Candidate]:
        for density in densities:
            for value in values:
                yield _task_vectors(given, method, {outer: value, "density": density})

    return grid


def _task_vectors(given: Ingredients, method: str, chosen: dict[str, float]) -> Candidate:
    given.require_base()
    count = len(given.sources)
    each = {"weight": [1.0] * count}
    each |= {k: [v] * count for k, v in chosen.items() if k != "lambda"}
    shared = {k: v for k, v in chosen.items() if k == "lambda"}
    return Candidate(chosen, given.write(method, shared, each))


GRIDS: dict[str, Callable[[Ingredients], Iterator[Candidate]]] = {
    "linear": linear,
    "slerp": slerp,
    "task_arithmetic": task_arithmetic,
    "ties": _grid("ties", "lambda", SCALES, DENSITIES),
    "dare_ties": _grid("dare_ties", "weight", WEIGHTS, DENSITIES),
    "della": _grid("della", "lambda", SCALES, NEAR_DENSITIES),
    "model_stock": model_stock,
    "karcher": karcher,
}


def weighted(
    given: Ingredients, weights: Sequence[float], densities: Sequence[float] | None
) -> Candidate:
    """A merge with a weight, and a density, for each source: what the evolution searches.

    `breadcrumbs` without outliers is task arithmetic on task vectors trimmed by magnitude. With
    full densities and equal weights it is the plain average. Without a base there are only weights.
    """
    if densities is None:
        shared = {"weight": 0.0, "normalize": False}
        return Candidate(
            {"weight": list(weights)}, given.write("linear", shared, {"weight": weights})
        )
    each = {"weight": weights, "density": densities, "gamma": [0.0] * len(weights)}
    chosen = {"weight": list(weights), "density": list(densities)}
    return Candidate(chosen, given.write("breadcrumbs", None, each))
