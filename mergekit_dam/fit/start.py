"""Where a fit starts, before any data are looked at: the plain average, the weights of the YAML, or
another fit's coefficients."""

import os
from collections.abc import Iterator, Sequence

import torch
from mergekit.common import ModelReference
from torch import Tensor

from mergekit_dam.coefficients import CoefficientFile, open_file
from mergekit_dam.config import Settings
from mergekit_dam.config.settings import STARTS
from mergekit_dam.errors import DamError
from mergekit_dam.formula import coefficient_shape
from mergekit_dam.headers import HeaderShapes
from mergekit_dam.model import Role, Skeleton, SourceWeights
from mergekit_dam.plan import Plan
from mergekit_dam.sources import match
from mergekit_dam.task_vectors import Preparation, resolve


def choose_start(settings: Settings, plan: Plan) -> str:
    """What `dam.start` says; by default the YAML's weights, where it gives some, or else least
    squares, unless layers have no counterparts (docs/experiments.md has the measurements)."""
    if settings.start is not None:
        return settings.start
    if _has_weights(plan):
        return "weights"
    return "least_squares" if first_of_another_layout(plan) is None else "average"


def _has_weights(plan: Plan) -> bool:
    return any(
        values.get("weight") is not None
        for output in plan.tensors.values()
        for values in output.input_parameters.values()
    )


def first_of_another_layout(plan: Plan) -> ModelReference | None:
    """A source that is a model of its own rather than a filling of the merge's skeleton, so that
    its layers have no counterparts in the merge."""
    return next(iter(plan.models_of_their_own), None)


def start_problems(settings: Settings, plan: Plan) -> Iterator[str]:
    """Why the fit could not start where `dam.start` says."""
    other = first_of_another_layout(plan) if settings.start == "least_squares" else None
    if other is not None:
        yield (
            f"`dam.start: least_squares` compares layer with layer, and those of {other} are not "
            "the merge's: use `start: average`"
        )
    if settings.start not in (None, *STARTS):
        if os.path.isfile(settings.start):
            _rows_of_file(open_file(settings.start), plan)
        else:
            yield (
                f"`dam.start` is {settings.start}, which is no file: give the path of a "
                f"coefficient file, or one of {', '.join(STARTS)}"
            )


def start(
    plan: Plan, skeleton: Skeleton, weights: SourceWeights, settings: Settings
) -> dict[str, Tensor]:
    """Output tensor -> coefficients [N, *B]; `least_squares` goes on from the ones made here.

    Equal in each tensor, one number for each source, unless they are another fit's. A source
    without an optional tensor has zeros there, and keeps them. Least squares without steps after it
    begins at the base, where that is a source.
    """
    result = {}
    chosen = choose_start(settings, plan)
    file = None if chosen in STARTS else open_file(chosen)
    rows_of_file = _rows_of_file(file, plan) if file is not None else []
    # What is nearest to the base is better as it is; what is nearest to the average is the better
    # place for a fit to begin (docs/experiments.md).
    is_from_base = (
        chosen == "least_squares"
        and settings.max_steps == 0
        and plan.has_base
        and not _has_weights(plan)
    )
    for name in weights.names():
        stack = weights[name]
        shape = shape_of(name, stack.shape, skeleton, settings)
        if file is not None:
            result[name] = _from_file(file, rows_of_file, name, shape, len(plan.sources))
            continue
        rows = stack.rows[: stack.teachers]
        given = starting_weights(plan, name, rows, settings, ignored=chosen == "average")
        values = torch.zeros(len(plan.sources))  # of a base that teaches nothing, too
        if is_from_base and len(stack.rows) > len(rows):
            values[-1] = 1.0
        else:
            values[list(rows)] = torch.tensor(given)
        result[name] = values.reshape(-1, *[1] * len(shape)).expand(-1, *shape).clone()
    return result


def _from_file(
    file: CoefficientFile, rows: list[int], name: str, shape: tuple[int, ...], sources: int
) -> Tensor:  # [N, *B] of so many sources
    """Another fit's coefficients; those of a coarser granularity hold for each of its parts."""
    file.check_shape(name, shape)
    found = file.get(name)[rows].expand(-1, *shape)
    absent = found.new_zeros(sources - len(rows), *shape)
    return torch.cat([found, absent])


def _rows_of_file(file: CoefficientFile, plan: Plan) -> list[int]:
    """Of the plan's sources; a file that was fitted without the base has no row for it."""
    rows = match(file.header.sources, plan.sources)
    if plan.has_base and rows[-1] is None:
        rows.pop()
    if None in rows or len(file.header.sources) != len(rows):
        raise DamError(
            f"`dam.start`: {file.path} was fitted for other sources: give the file of a fit of "
            "these, or another start."
        )
    return rows


def shape_of(
    name: str, shape: Sequence[int], skeleton: Skeleton, settings: Settings
) -> tuple[int, ...]:
    """Of one source's coefficients for an output tensor."""
    # A tensor that the model does not use (its coefficients stay as they are) is a vector or a
    # matrix like any other.
    role = skeleton.roles.get(name, Role("linear", tuple(shape)))
    return coefficient_shape(
        shape,
        settings.granularity_of(name),
        input_axis=role.input_axis,
        bias=role.kind == "bias",
    )


def foreseen_shapes(
    settings: Settings, shapes: HeaderShapes, skeleton: Skeleton
) -> dict[str, tuple[int, ...]]:
    """`shape_of` each output tensor [*B], from the headers of the sources' files."""
    found = {}
    for name in shapes.names():
        role = skeleton.roles.get(name)
        shape = role.shape if role else shapes.shape(name) or ()
        found[name] = shape_of(name, shape, skeleton, settings)
    return found


def starting_weights(
    plan: Plan, name: str, rows: Sequence[int], settings: Settings, *, ignored: bool = False
) -> list[float]:
    """One starting coefficient for each source that has the tensor, given by its row; the YAML's
    weights may be `ignored`.

    As in mergekit: `linear` divides by the sum of the weights unless told otherwise, methods on
    task vectors do not, or have divided in preparing them.
    """
    output, is_prepared = plan.tensors[name], settings.sparsify != "task_arithmetic"
    given = [output.input_parameters[plan.sources[row]].get("weight") for row in rows]
    if ignored or all(weight is None for weight in given):
        return [1 / (len(plan.sources) if is_prepared else len(rows))] * len(rows)
    if None in given:
        source = plan.sources[rows[given.index(None)]]
        raise DamError(
            f"`weight` is given for some sources of {name} and not for {source}: give it for all "
            "of them, or for none to start from the plain average."
        )
    normalize = output.parameters.get("normalize")
    if settings.formula == "weights" and normalize is not False:
        if (total := sum(given)) == 0:
            raise DamError(f"The weights of {name} sum up to zero: change them.")
        return [weight / total for weight in given]
    if settings.formula == "task_vectors" and not is_prepared:
        scale = output.parameters.get("lambda")
        divisor = sum(given) if normalize else 1.0
        return [weight * (1.0 if scale is None else scale) / (divisor or 1.0) for weight in given]
    return given


def trained_tensors(skeleton: Skeleton, settings: Settings) -> set[str]:
    """The output tensors of the kinds that `dam.train` leaves switched on."""
    return {name for name, role in skeleton.roles.items() if getattr(settings.train, role.kind)}


def prepare_as(plan: Plan, settings: Settings) -> Preparation | None:
    """How the task vectors are sparsified, for the fit and for its file; None: not at all."""
    if settings.sparsify == "task_arithmetic":
        return None
    tensors = {
        name: resolve(
            settings.sparsify,
            output.parameters,
            [output.input_parameters.get(source, {}) for source in plan.sources],
        )
        for name, output in plan.tensors.items()
    }
    return Preparation(method=settings.sparsify, seed=settings.seed, tensors=tensors)
