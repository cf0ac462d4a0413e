"""The coefficients that minimise a layer's objective, by conjugate gradients.

The objective is quadratic in the weights, and these are affine in the coefficients (`formula`),
so its gradient is the one that a fit computes: A(W) - B, reduced to the coefficients. No normal
matrix of N·in unknowns is formed, whatever the granularity: an iteration makes the weights once,
takes one matrix product and reduces once.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mergekit_dam.formula import combine
from mergekit_dam.least_squares.objective import LayerObjective, Weights
from mergekit_dam.model import Inputs

Coefficients = dict[str, Tensor]  # output tensor -> [n, *B], of the n sources that have it

JITTER = 1e-6  # of a block's largest entry: float32 mostly rounds one of rank one to below that
TRIES = 7  # up to the largest entry itself


class Problem:
    """An objective as a function of the coefficients of its layer's tensors."""

    def __init__(
        self,
        objective: LayerObjective,
        inputs: Mapping[str, Inputs],  # of the layer's output tensors
        dtype: torch.dtype = torch.float32,
    ):
        self.objective, self._inputs, self._dtype = objective, dict(inputs), dtype

    def value(self, coefficients: Coefficients) -> float:
        return self.objective.value(self._weights(coefficients))

    def gradient(self, coefficients: Coefficients) -> Coefficients:
        """df/dc."""

        def slope(weights: Weights) -> Weights:
            products, target = self.objective.product(weights), self.objective.target()
            return {name: product - target[name] for name, product in products.items()}

        return self._reduced(coefficients, slope)

    def curvature(self, step: Coefficients) -> Coefficients:
        """The second derivative's product with a step."""

        def along(weights: Weights) -> Weights:
            bases = {name: self._inputs[name].base for name in weights}
            linear = {n: w if bases[n] is None else w - bases[n] for n, w in weights.items()}
            return self.objective.product(linear)

        return self._reduced(step, along)

    def blocks(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """[*B, n, n]: the second derivatives of the coefficients that stand at one place, one
        from each source. `shape` is B."""
        parts = self._differences(name)
        axis = self.objective.input_axis
        if axis is not None and len(shape) > 1 and shape[axis] == 1:  # it sums what A mixes
            products = [self.objective.product(self._alone(name, part))[name] for part in parts]
        else:
            diagonal = self.objective.diagonal()[name]
            products = [diagonal * part for part in parts]
        blocks = parts[0].new_empty(*shape, len(parts), len(parts))
        for row, part in enumerate(parts):
            for column in range(row + 1):
                entry = (part * products[column]).sum_to_size(shape)
                blocks[..., row, column] = blocks[..., column, row] = entry
        return blocks

    def _weights(self, coefficients: Coefficients) -> Weights:
        return {name: self._weight(self._inputs[name], c) for name, c in coefficients.items()}

    def _weight(self, inputs: Inputs, coefficients: Tensor) -> Tensor:
        is_prepared = inputs.prepared is not None
        parts = inputs.prepared if is_prepared else inputs.sources
        return combine(coefficients, parts, inputs.base, self._dtype, prepared=is_prepared)

    def _reduced(
        self, coefficients: Coefficients, of_weights: Callable[[Weights], Weights]
    ) -> Coefficients:
        """A function of the weights, brought to the coefficients as a gradient is."""
        with torch.enable_grad():
            leaves = {n: c.detach().requires_grad_() for n, c in coefficients.items()}
            weights = self._weights(leaves)
        values = of_weights({name: weight.detach() for name, weight in weights.items()})
        gradients = torch.autograd.grad(
            [weights[name] for name in leaves],
            list(leaves.values()),
            [values[name] for name in leaves],
        )
        return dict(zip(leaves, gradients, strict=True))

    def _alone(self, name: str, part: Tensor) -> Weights:
        """One tensor of the layer, the others zero."""
        return {
            other: part if other == name else torch.zeros_like(own.sources[0], dtype=self._dtype)
            for other, own in self._inputs.items()
        }

    def _differences(self, name: str) -> list[Tensor]:  # D_i
        inputs = self._inputs[name]
        if inputs.prepared is not None:
            return [part.to(self._dtype) for part in inputs.prepared]
        base = 0 if inputs.base is None else inputs.base.to(self._dtype)
        return [source.to(self._dtype) - base for source in inputs.sources]


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
        for name, c in start.items():
            blocks = problem.blocks(name, tuple(c.shape[1:])).double()
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
    """Cholesky factors [*B, n, n], with as little on the diagonal as they need: identical sources
    make blocks that are singular but for rounding. `largest` are the blocks' entries [*B, 1]."""
    jitter = JITTER * largest.expand(blocks.shape[:-1])
    for _ in range(TRIES):
        factors, failed = torch.linalg.cholesky_ex(blocks + torch.diag_embed(jitter))
        if not failed.any():
            break
        jitter = torch.where(failed[..., None] > 0, 10 * jitter, jitter)
    return factors


def _plus(one: Coefficients, other: Coefficients, factor: float = 1.0) -> Coefficients:
    return {name: c + factor * other[name] for name, c in one.items()}


def _dot(one: Coefficients, other: Coefficients) -> float:
    return float(sum((c.double() * other[name].double()).sum() for name, c in one.items()))
