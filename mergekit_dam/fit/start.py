"""Where a fit starts: the plain average, or the weights of the YAML."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_dam.config import Settings
from mergekit_dam.errors import DamError
from mergekit_dam.formula import coefficient_shape
from mergekit_dam.model import Role, Skeleton, SourceWeights, Stack
from mergekit_dam.plan import Plan
from mergekit_dam.task_vectors import Preparation, resolve


def start(
    plan: Plan, skeleton: Skeleton, weights: SourceWeights, settings: Settings
) -> dict[str, Tensor]:
    """Output tensor -> coefficients [N, *B]: equal in each tensor, one number for each source.

    A source without an optional tensor has zeros there, and keeps them.
    """
    result = {}
    for name in weights.names():
        stack = weights[name]
        shape = _shape(name, stack, skeleton, settings)
        values = torch.zeros(len(plan.sources))
        given = starting_weights(plan, name, stack.rows, settings)
        values[list(stack.rows)] = torch.tensor(given)
        result[name] = values.reshape(-1, *[1] * len(shape)).expand(-1, *shape).clone()
    return result


def _shape(name: str, stack: Stack, skeleton: Skeleton, settings: Settings) -> tuple[int, ...]:
    # A tensor that the model does not use (its coefficients stay as they are) is a vector or a
    # matrix like any other.
    role = skeleton.roles.get(name, Role("linear", tuple(stack.shape)))
    return coefficient_shape(
        stack.shape,
        settings.granularity_of(name),
        input_axis=role.input_axis,
        bias=role.kind == "bias",
    )


def starting_weights(plan: Plan, name: str, rows: Sequence[int], settings: Settings) -> list[float]:
    """One starting coefficient for each source that has the tensor, given by its row.

    As in mergekit: `linear` divides by the sum of the weights unless told otherwise, methods on
    task vectors do not, or have divided in preparing them.
    """
    output, is_prepared = plan.tensors[name], settings.sparsify != "task_arithmetic"
    given = [output.input_parameters[plan.sources[row]].get("weight") for row in rows]
    if all(weight is None for weight in given):
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
