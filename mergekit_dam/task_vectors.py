"""Task vectors prepared as mergekit's own methods do it: sparsified, signs in consensus.

mergekit's `sparsify` and `get_mask` are used, not rewritten. What a fit has used is recorded in
its file, so that the merge prepares the very same: the parameters of every tensor, and the seed
of the random masks, which are drawn on the CPU whatever the device.
"""

import threading
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import pydantic
import torch
from torch import Tensor

from mergekit_dam.errors import DamError

Sparsify = Literal[
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
]
METHODS: tuple[str, ...] = get_args(Sparsify)

_RANDOM = threading.Lock()  # mergekit's masks come from the global generator; merges have threads


class Parameters(pydantic.BaseModel, frozen=True, extra="forbid"):
    """One output tensor's, named as in mergekit's YAML; lists are in the order of the sources."""

    weight: tuple[pydantic.FiniteFloat, ...]
    density: tuple[float, ...]
    gamma: tuple[float, ...]
    epsilon: tuple[float, ...]
    normalize: bool
    rescale: bool
    scale: pydantic.FiniteFloat  # `lambda` in the YAML

    def counts(self) -> set[int]:
        """How long its lists are."""
        return set(map(len, (self.weight, self.density, self.gamma, self.epsilon)))


class Preparation(pydantic.BaseModel, frozen=True, extra="forbid"):
    """How a fit has prepared its task vectors."""

    method: Sparsify
    seed: int
    tensors: dict[str, Parameters]

    @pydantic.model_validator(mode="after")
    def _is_in_range(self) -> "Preparation":
        for found in self.tensors.values():
            if len(found.counts()) > 1:
                raise ValueError("its lists are of different length")
            if problem := _range_problem(self.method, found):
                raise ValueError(problem)
        return self

    def counts(self) -> set[int]:
        """For how many sources it is: one number, unless it is damaged."""
        return set().union(*(found.counts() for found in self.tensors.values()))


def resolve(
    method: Sparsify, shared: Mapping[str, Any], per_source: Sequence[Mapping[str, Any]]
) -> Parameters:
    """The YAML's parameters of one tensor, with the method's defaults where it gives none.

    `per_source` has one mapping for each source; a weight that is not given is 1/N, as in the
    plain average.
    """
    from mergekit import merge_methods

    defaults = {p.name: p.default for p in merge_methods.get(method).spec.parameters}

    def given(values: Mapping[str, Any], name: str, default: Any) -> Any:
        value = values.get(name)
        return defaults.get(name, default) if value is None else value

    def each(name: str, default: float) -> tuple[float, ...]:
        return tuple(given(values, name, default) for values in per_source)

    equal = 1 / len(per_source)
    weights = tuple(v["weight"] if v.get("weight") is not None else equal for v in per_source)
    found = Parameters(
        weight=weights,
        density=each("density", 1.0),
        gamma=each("gamma", 0.0),
        epsilon=each("epsilon", 0.0),
        normalize=given(shared, "normalize", False),
        rescale=given(shared, "rescale", False),
        scale=given(shared, "lambda", 1.0),
    )
    if problem := _range_problem(method, found):
        raise DamError(problem)
    return found


def _range_problem(method: Sparsify, found: Parameters) -> str:
    """What mergekit's methods do not take; nothing where they take all."""
    for density, gamma, epsilon in zip(found.density, found.gamma, found.epsilon, strict=True):
        if not 0 < density <= 1:
            return f"`density` is {density:g}: give the share to keep, above 0, at most 1."
        if not 0 <= gamma < 1:
            return f"`gamma` is {gamma:g}: give the share to drop, from 0 and below 1."
        is_random = method.startswith("della") and density < 1
        if is_random and not 0 < density - epsilon <= density + epsilon < 1:
            return (
                f"`epsilon` is {epsilon:g} at a `density` of {density:g}: their difference must be "
                "above 0, and their sum below 1."
            )
    return ""


def prepare(
    name: str,
    sources: Sequence[Tensor],  # W_i, each of shape S, in one dtype
    rows: Sequence[int],  # the sources' numbers in the lists of the parameters
    base: Tensor,  # W_base, S
    preparation: Preparation,
) -> list[Tensor]:
    """D_i, each S in float32, such that base + Σ weight_i * D_i is the method's own merge.

    The differences are taken and sparsified in the sources' dtype, as mergekit does it. Signs are
    in consensus, and the sum normalised, for the weights that the fit starts from.
    """
    from mergekit import merge_methods
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask

    parameters = preparation.tensors[name]
    method = merge_methods.get(preparation.method)
    kept = []
    for row, source in zip(rows, sources, strict=True):
        seed = zlib.crc32(f"{preparation.seed} {row} {name}".encode())
        kept.append(_sparsify((source - base).cpu(), method, parameters, row, seed).float())
    deltas = torch.stack(kept)
    # On the CPU whatever the default device is: mergekit sets one for each of several GPUs.
    weights = torch.tensor([parameters.weight[row] for row in rows], device="cpu")
    weights = weights.reshape(-1, *(1,) * base.dim())
    if method.consensus_method is not None:
        mask = get_mask(deltas * weights, method=method.consensus_method.value)
        deltas, divisor = deltas * mask, (weights * mask).sum(0)
        divisor[divisor == 0] = 1
    else:
        divisor = weights.sum(0)
        divisor[divisor.abs() < 1e-8] = 1
    if parameters.normalize:
        deltas = deltas / divisor
    return list((deltas * parameters.scale).to(base.device))


def _sparsify(delta: Tensor, method: Any, parameters: Parameters, row: int, seed: int) -> Tensor:
    from mergekit.sparsify import RescaleNorm, sparsify

    if method.sparsification_method is None:
        return delta
    with _RANDOM, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return sparsify(
            delta,
            density=parameters.density[row],
            method=method.sparsification_method,
            gamma=parameters.gamma[row],
            epsilon=parameters.epsilon[row],
            rescale_norm=RescaleNorm.l1 if parameters.rescale else None,
        )
