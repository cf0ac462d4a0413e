"""How far a layer's outputs are from their targets: a quadratic function of the layer's weights.

Each objective collects sums over the calibration tokens, so that what it keeps does not grow
with them, and is then a function of the weights alone:

    f(W) = ½ <W, A(W)> - <W, B> + const

with A symmetric and positive semidefinite. W is a dict of a layer's tensors (weight and bias).
Every token of a source counts as one over the number of that source's tokens.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

Weights = dict[str, Tensor]


class LayerObjective(ABC):
    """f of one layer."""

    input_axis: int | None = None  # the axis of the weight that A mixes; None where A is diagonal

    def __init__(self) -> None:
        self.constant = 0.0  # ½ Σ ‖y‖²

    @abstractmethod
    def product(self, weights: Weights) -> Weights:
        """A(W)."""

    @abstractmethod
    def target(self) -> Weights:
        """B."""

    @abstractmethod
    def diagonal(self) -> Weights:
        """The diagonal of A, broadcastable to W."""

    def value(self, weights: Weights) -> float:
        """f(W); never below zero but for rounding."""
        half, target = self.product(weights), self.target()
        terms = [(w * (half[name] / 2 - target[name])).sum() for name, w in weights.items()]
        return float(torch.stack(terms).double().sum()) + self.constant


class LinearObjective(LayerObjective):
    """Σ ½ ‖W x + b - y‖² for a weight kept as [out, in], or as [in, out] with `input_axis` -2."""

    def __init__(self, weight: str, bias: str | None, input_axis: int = -1):
        super().__init__()
        self._weight, self._bias, self.input_axis = weight, bias, input_axis
        self._moments: Tensor | float = 0.0  # Σ x xᵀ, [in, in]
        self._cross: Tensor | float = 0.0  # Σ y xᵀ, [out, in]
        self._inputs: Tensor | float = 0.0  # Σ x, [in]
        self._outputs: Tensor | float = 0.0  # Σ y, [out]
        self._count = 0.0

    def add(self, inputs: Tensor, outputs: Tensor, weight: float) -> None:
        """Tokens [T, in] and the outputs [T, out] that are wanted for them."""
        x, y = _accurate(inputs), _accurate(outputs)
        self._moments = self._moments + weight * (x.T @ x)
        self._cross = self._cross + weight * (y.T @ x)
        self._inputs = self._inputs + weight * x.sum(0)
        self._outputs = self._outputs + weight * y.sum(0)
        self._count += weight * len(x)
        self.constant += weight * float(y.square().sum()) / 2

    def product(self, weights: Weights) -> Weights:
        weight = self._turned(weights[self._weight])
        result = weight @ self._moments
        if self._bias is None:
            return {self._weight: self._turned(result)}
        bias = weights[self._bias]
        return {
            self._weight: self._turned(result + bias[:, None] * self._inputs),
            self._bias: weight @ self._inputs + self._count * bias,
        }

    def target(self) -> Weights:
        target = {self._weight: self._turned(self._cross)}
        return target if self._bias is None else {**target, self._bias: self._outputs}

    def diagonal(self) -> Weights:
        moments = self._turned(self._moments.diagonal()[None])  # [1, in]
        if self._bias is None:
            return {self._weight: moments}
        return {self._weight: moments, self._bias: moments.new_tensor([self._count])}

    def _turned(self, matrix: Tensor) -> Tensor:
        return matrix if self.input_axis == -1 else matrix.T


class EmbeddingObjective(LayerObjective):
    """Σ ½ ‖W[token] - y‖² for a weight [vocabulary, hidden]."""

    def __init__(self, weight: str):
        super().__init__()
        self._weight = weight
        self._counts: Tensor | float = 0.0  # [vocabulary]
        self._outputs: Tensor | float = 0.0  # Σ y, [vocabulary, hidden]

    def add(self, counts: Tensor, source: Tensor, weight: float) -> None:
        """How often each token comes [vocabulary], and the embedding that is wanted for it."""
        counts, wanted = weight * _accurate(counts)[:, None], _accurate(source)
        self._counts = self._counts + counts
        self._outputs = self._outputs + counts * wanted
        self.constant += float((counts * wanted.square()).sum()) / 2

    def product(self, weights: Weights) -> Weights:
        return {self._weight: self._counts * weights[self._weight]}

    def target(self) -> Weights:
        return {self._weight: self._outputs}

    def diagonal(self) -> Weights:
        return {self._weight: self._counts}


class NormObjective(LayerObjective):
    """Σ ½ ‖x * w + b - y‖² for a weight and a bias of shape [dimensions]."""

    def __init__(self, weight: str, bias: str | None):
        super().__init__()
        self._weight, self._bias = weight, bias
        self._sums: dict[str, Tensor | float] = dict.fromkeys(("xx", "x", "1", "xy", "y"), 0.0)

    def add(self, inputs: Tensor, outputs: Tensor, weight: float) -> None:
        """Normalised inputs [T, dimensions] and the outputs that are wanted for them."""
        x, y = _accurate(inputs), _accurate(outputs)
        terms = {"xx": x * x, "x": x, "1": torch.ones_like(x), "xy": x * y, "y": y}
        for name, term in terms.items():
            self._sums[name] = self._sums[name] + weight * term.sum(0)
        self.constant += weight * float(y.square().sum()) / 2

    def product(self, weights: Weights) -> Weights:
        weight, sums = weights[self._weight], self._sums
        if self._bias is None:
            return {self._weight: sums["xx"] * weight}
        bias = weights[self._bias]
        return {
            self._weight: sums["xx"] * weight + sums["x"] * bias,
            self._bias: sums["x"] * weight + sums["1"] * bias,
        }

    def target(self) -> Weights:
        return self._named(self._sums["xy"], self._sums["y"])

    def diagonal(self) -> Weights:
        return self._named(self._sums["xx"], self._sums["1"])

    def _named(self, weight: Tensor, bias: Tensor) -> Weights:
        return {self._weight: weight} | ({} if self._bias is None else {self._bias: bias})


def _accurate(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
