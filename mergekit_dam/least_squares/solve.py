"""The coefficients that minimise a layer's objective, by conjugate gradients.

No normal matrix of N·in unknowns is formed, whatever the granularity: an iteration makes the
weights once, takes one matrix product and reduces once.
"""

import torch
from torch import Tensor

from mergekit_dam.least_squares.problem import Coefficients, Problem

JITTER = 1e-6  # of a block's largest entry: float32 mostly rounds one of rank one to below that
TRIES = 7  # up to the largest entry itself


def solve(
    problem: Problem,
    start: Coefficients,
    ridge: float,
    *,
    first: Coefficients | None = None,
    iterations: int = 100,
    tolerance: float = 1e-4,
) -> Coefficients:
    """Minimise f(c) + ½ ridge Σ s ‖c - start‖², s being a tensor's mean second derivative of f.

    Begins at `first`, by default the start, and goes downhill only, so that f of the result is
    never above f of the start. What the data say nothing of keeps its start.
    """
    blocks = _Blocks(problem, start, ridge)
    found = dict(first or start)
    offset = {name: c - start[name] for name, c in found.items()}
    pull = _plus(problem.gradient(found), blocks.penalty(offset))
    residual = {name: -c for name, c in pull.items()}
    step = conditioned = blocks.solved(residual)
    height = _dot(residual, conditioned)
    enough = tolerance**2 * height
    for _ in range(iterations):
        if height <= enough:
            break
        bent = _plus(problem.curvature(step), blocks.penalty(step))
        curve = _dot(step, bent)
        if curve <= 0:  # nothing but rounding is left
            break
        found = _plus(found, step, height / curve)
        residual = _plus(residual, bent, -height / curve)
        conditioned = blocks.solved(residual)
        before, height = height, _dot(residual, conditioned)
        step = _plus(conditioned, step, height / before)
    return found


class _Blocks:
    """The preconditioner: f's and the penalty's second derivatives, as far as they connect the
    sources' coefficients at one place. Sources close to each other make these blocks nearly
    singular, and iterations without them slow."""

    def __init__(self, problem: Problem, start: Coefficients, ridge: float):
        self._penalties: dict[str, float] = {}
        self._factors: Coefficients = {}  # [*B, n, n]
        for name, known in problem.blocks(start).items():
            blocks = known.to(torch.float64, copy=True)
            diagonal = blocks.diagonal(dim1=-2, dim2=-1)
            self._penalties[name] = ridge * float(diagonal.mean())
            largest = diagonal.amax(-1, keepdim=True)
            # Where no token reaches there is no derivative, and no residual either.
            diagonal.add_(self._penalties[name] + (largest == 0))
            self._factors[name] = _factors(blocks, largest)

    def solved(self, residual: Coefficients) -> Coefficients:
        return {name: self._solved(name, r) for name, r in residual.items()}

    def _solved(self, name: str, residual: Tensor) -> Tensor:
        places = residual.movedim(0, -1)[..., None].double()
        result = torch.cholesky_solve(places, self._factors[name])
        return result[..., 0].movedim(-1, 0).to(residual.dtype)

    def penalty(self, offset: Coefficients) -> Coefficients:
        """The gradient of the penalty at an offset from the start."""
        return {name: self._penalties[name] * c for name, c in offset.items()}


def _factors(blocks: Tensor, largest: Tensor) -> Tensor:
    """Cholesky factors [*B, n, n], with as little on the diagonal as they need, which the blocks
    keep: identical sources make blocks that are singular but for rounding. `largest` are the
    blocks' entries [*B, 1]."""
    jitter, diagonal = JITTER * largest, blocks.diagonal(dim1=-2, dim2=-1)
    more = jitter
    for _ in range(TRIES):
        diagonal.add_(more)
        factors, failed = torch.linalg.cholesky_ex(blocks)
        if not failed.any():
            break
        more = torch.where(failed[..., None] > 0, 9 * jitter, 0)  # ten times as much in all
        jitter = jitter + more
    return factors


def _plus(one: Coefficients, other: Coefficients, factor: float = 1.0) -> Coefficients:
    return {name: c + factor * other[name] for name, c in one.items()}


def _dot(one: Coefficients, other: Coefficients) -> float:
    return float(sum((c.double() * other[name].double()).sum() for name, c in one.items()))
