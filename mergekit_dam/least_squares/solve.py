"""The coefficients that minimise a layer's objective, by conjugate gradients.

The objective is quadratic in the weights, and these are linear in the coefficients (`formula`),
so the gradient is the one that a fit would compute: A(W) - B, reduced to the coefficients. No
normal matrix is formed, whatever the granularity: an iteration makes the weights once, takes one
matrix product, and reduces once.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mergekit_dam.least_squares.objective import LayerObjective, Weights
from mergekit_dam.model import Stack

Coefficients = dict[str, Tensor]  # output tensor -> [n, *B], of the n sources that have it

JITTER = 1e-9  # of a block's diagonal: identical sources make it singular


class Problem:
    """An objective as a function of the coefficients of the layer's tensors."""

    def __init__(
        self,
        objective: LayerObjective,
        stacks: Mapping[str, Stack],
        dtype: torch.dtype = torch.float32,
    ):
        self.objective, self._stacks, self._dtype = objective, dict(stacks), dtype

    def weights(self, coefficients: Coefficients) -> Weights:
        return {
            name: self._stacks[name].merge(c, self._dtype) for name, c in coefficients.items()
        }

    def value(self, coefficients: Coefficients) -> float:
        return self.objective.value(self.weights(coefficients))

    def gradient(self, coefficients: Coefficients) -> Coefficients:
        """df/dc."""
        target = self.objective.target()
        return self._reduced(
            coefficients,
            lambda weights: {
                name: product - target[name]
                for name, product in self.objective.product(weights).items()
            },
        )

    def curvature(self, direction: Coefficients) -> Coefficients:
        """The second derivative's product with a direction."""

        def along(weights: Weights) -> Weights:
            bases = {name: self._stacks[name].base for name in weights}
            linear = {n: w if bases[n] is None else w - bases[n] for n, w in weights.items()}
            return self.objective.product(linear)

        return self._reduced(direction, along)

    def _reduced(self, coefficients: Coefficients, of_weights) -> Coefficients:
        """A function of the weights, brought to the coefficients as a gradient is."""
        with torch.enable_grad():
            leaves = {n: c.detach().requires_grad_() for n, c in coefficients.items()}
            weights = self.weights(leaves)
        values = of_weights({name: w.detach() for name, w in weights.items()})
        ordered = [values[name] for name in leaves]
        gradients = torch.autograd.grad(list(weights.values()), list(leaves.values()), ordered)
        return dict(zip(leaves, gradients, strict=True))

    def blocks(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """[*B, n, n]: the second derivatives of the coefficients that stand at one place, one
        from each source. `shape` is B."""
        parts = self._differences(name)
        axis, mixed = self.objective.input_axis, None
        if len(shape) > 1 and axis is not None and shape[axis] == 1:  # rows and whole tensors
            mixed = [self.objective.product(self._alone(name, part))[name] for part in parts]
        else:
            diagonal = self.objective.diagonal()[name]
            mixed = [diagonal * part for part in parts]
        n = len(parts)
        result = torch.empty(*shape, n, n, dtype=torch.float64, device=parts[0].device)
        for k in range(n):
            for i in range(k + 1):
                entry = (parts[k] * mixed[i]).sum_to_size(shape)
                result[..., k, i] = result[..., i, k] = entry
        return result

    def _alone(self, name: str, part: Tensor) -> Weights:
        """One tensor of the layer, the others zero."""
        return {
            other: part if other == name else torch.zeros_like(s.sources[0], dtype=self._dtype)
            for other, s in self._stacks.items()
        }

    def _differences(self, name: str) -> list[Tensor]:  # D_i
        parts, base = self._stacks[name].parts
        base = 0 if base is None else base.to(self._dtype)
        return [part.to(self._dtype) - base for part in parts]


def solve(
    problem: Problem,
    start: Coefficients,
    ridge: float,
    *,
    first: Coefficients | None = None,
    iterations: int = 100,
    tolerance: float = 1e-4,
) -> Coefficients:
    """Minimise f(c) + ½ ridge Σ s (c - start)², s being the second derivatives of f.

    f and the penalty together never rise above their value at `first`, by default the start:
    conjugate gradients go downhill only. What the data say nothing of keeps its start.
    """
    inverse = _Inverse(problem, start, ridge)
    found = dict(first or start)
    residual = _plus(_negative(problem.gradient(found)), inverse.penalty(found), -1.0)
    direction = conditioned = inverse(residual)
    height = _dot(residual, conditioned)
    enough = tolerance**2 * height
    for _ in range(iterations):
        if height <= enough:
            break
        bent = _plus(problem.curvature(direction), inverse.penalty(direction, of_step=True), 1.0)
        curve = _dot(direction, bent)
        if curve <= 0:  # nothing but rounding is left
            break
        found = _plus(found, direction, height / curve)
        residual = _plus(residual, bent, -height / curve)
        conditioned = inverse(residual)
        before, height = height, _dot(residual, conditioned)
        direction = _plus(conditioned, direction, height / before)
    return found


class _Inverse:
    """The preconditioner: the inverse of f's and the penalty's second derivatives, as far as they
    connect the sources' coefficients at one place. Sources that are close to each other make
    these blocks nearly singular, and an iteration without them slow."""

    def __init__(self, problem: Problem, start: Coefficients, ridge: float):
        self._start, self._penalties, self._factors = start, {}, {}
        for name, c in start.items():
            blocks = problem.blocks(name, tuple(c.shape[1:]))  # [*B, n, n]
            diagonal = blocks.diagonal(dim1=-2, dim2=-1)
            self._penalties[name] = ridge * float(diagonal.mean())
            # A column that no token reaches has no derivatives, and its coefficients stay.
            floor = JITTER * diagonal + (diagonal == 0)
            blocks.diagonal(dim1=-2, dim2=-1).add_(ridge * diagonal.mean() + floor)
            self._factors[name] = torch.linalg.cholesky(blocks)

    def __call__(self, residual: Coefficients) -> Coefficients:
        return {name: self._solved(name, r) for name, r in residual.items()}

    def _solved(self, name: str, residual: Tensor) -> Tensor:
        places = residual.movedim(0, -1)[..., None].double()
        return torch.cholesky_solve(places, self._factors[name])[..., 0].movedim(-1, 0).to(residual)

    def penalty(self, coefficients: Coefficients, *, of_step: bool = False) -> Coefficients:
        """The penalty's gradient at some coefficients, or its curvature along a step."""
        return {
            name: self._penalties[name] * (c if of_step else c - self._start[name])
            for name, c in coefficients.items()
        }


def _plus(one: Coefficients, other: Coefficients, factor: float) -> Coefficients:
    return {name: c + factor * other[name] for name, c in one.items()}


def _negative(one: Coefficients) -> Coefficients:
    return {name: -c for name, c in one.items()}


def _dot(one: Coefficients, other: Coefficients) -> float:
    return float(sum((c.double() * other[name].double()).sum() for name, c in one.items()))
