"""How far a layer's outputs are from their targets: a quadratic function of the layer's weights.

Each objective collects sums over the calibration tokens, so that what it keeps does not grow
with them, and is then a function of the weights alone:

    f(W) = ½ <W, A(W)> - <W, B> + const

with A symmetric and positive semidefinite. W is a dict of a layer's tensors (weight and bias).
Every token of a source counts as one over the number of that source's tokens.

A layer's outputs do not depend on each other, so f is a sum over them, and an objective comes in
`parts` of some outputs each: heads and embeddings have too many for float32 copies of them all.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Weights = dict[str, Tensor]
PART = 2**24  # numbers of a weight that are worked on at a time: 64 MB in float32


class LayerObjective(ABC):
    """f of one layer, collected."""

    @abstractmethod
    def parts(self) -> Iterator["Part"]:
        """What f is the sum of, but for its constant, ½ Σ ‖y‖²."""


class Part(ABC):
    """f of some of a layer's outputs."""

    input_axis: int | None  # the axis of the weight that A mixes; None where A is diagonal

    @abstractmethod
    def index(self, name: str, tensor: Tensor, behind: int = 0) -> tuple:
        """Where one of the layer's tensors, or what is broadcast to it, has these outputs; `behind`
        more axes follow."""

    @abstractmethod
    def product(self, weights: Weights) -> Weights:
        """A(W)."""

    @abstractmethod
    def target(self) -> Weights:
        """B."""

    @abstractmethod
    def diagonal(self) -> Weights:
        """The diagonal of A, broadcastable to W."""


def _along(axis: int, rows: slice | Tensor, tensor: Tensor, behind: int) -> tuple:
    """Some rows of an axis, counted from the last one before those `behind`; what is broadcast
    along it is the same for all."""
    if tensor.shape[axis - behind] == 1:
        return (...,)
    return (..., rows, *[slice(None)] * (behind - axis - 1))


class LinearObjective(LayerObjective):
    """Σ ½ ‖W x + b - y‖² for a weight kept as [out, in], or as [in, out] with `input_axis` -2."""

    def __init__(self, weight: str, bias: str | None, input_axis: int = -1):
        self._names = (weight, bias, input_axis)
        self._sums: LinearPart | None = None

    def add(self, inputs: Tensor, outputs: Tensor, weight: float) -> None:
        """Tokens [T, in] and the outputs [T, out] that are wanted for them."""
        x, y = _accurate(inputs), _accurate(outputs)
        self._sums = self._sums or LinearPart.zeros(*self._names, x, y)
        self._sums.moments.addmm_(x.T, x, alpha=weight)
        self._sums.cross.addmm_(y.T, x, alpha=weight)
        self._sums.inputs.add_(x.sum(0), alpha=weight)
        self._sums.outputs.add_(y.sum(0), alpha=weight)
        self._sums.count.add_(weight * len(x))

    def parts(self) -> Iterator["LinearPart"]:
        outputs, inputs = self._sums.cross.shape
        step = max(1, PART // inputs)
        for start in range(0, outputs, step):
            rows = slice(start, min(outputs, start + step))
            own = {"cross": self._sums.cross[rows], "outputs": self._sums.outputs[rows]}
            yield replace(self._sums, rows=rows, **own)


@dataclass(frozen=True)
class LinearPart(Part):
    """Of a slice of the outputs."""

    weight: str
    bias: str | None
    input_axis: int
    rows: slice
    moments: Tensor  # Σ x xᵀ, [in, in]
    cross: Tensor  # Σ y xᵀ, [out, in]
    inputs: Tensor  # Σ x, [in]
    outputs: Tensor  # Σ y, [out]
    count: Tensor  # Σ 1, []

    @classmethod
    def zeros(cls, weight: str, bias: str | None, input_axis: int, x: Tensor, y: Tensor):
        n, m = x.shape[1], y.shape[1]
        sums = (x.new_zeros(*shape) for shape in ((n, n), (m, n), (n,), (m,)))
        return cls(weight, bias, input_axis, slice(None), *sums, x.new_zeros(()))

    def index(self, name: str, tensor: Tensor, behind: int = 0) -> tuple:
        axis = -3 - self.input_axis if name == self.weight else -1
        return _along(axis, self.rows, tensor, behind)

    def product(self, weights: Weights) -> Weights:
        weight = self._turned(weights[self.weight])
        result = weight @ self.moments
        if self.bias is None:
            return {self.weight: self._turned(result)}
        bias = weights[self.bias]
        return {
            self.weight: self._turned(result.addcmul_(bias[:, None], self.inputs)),
            self.bias: weight @ self.inputs + self.count * bias,
        }

    def target(self) -> Weights:
        target = {self.weight: self._turned(self.cross)}
        return target if self.bias is None else {**target, self.bias: self.outputs}

    def diagonal(self) -> Weights:
        moments = self._turned(self.moments.diagonal()[None])  # [1, in]
        return {self.weight: moments} | ({} if self.bias is None else {self.bias: self.count[None]})

    def _turned(self, matrix: Tensor) -> Tensor:
        return matrix if self.input_axis == -1 else matrix.T


class EmbeddingObjective(LayerObjective):
    """Σ ½ ‖W[token] - y‖² for a weight [vocabulary, hidden], of which only the rows of tokens that
    come are looked at."""

    def __init__(self, weight: str):
        self._weight = weight
        self._wanted: list[tuple[Tensor, Tensor]] = []  # each source's, and its counts

    def add(self, counts: Tensor, source: Tensor, weight: float) -> None:
        """How often each token comes [vocabulary], and the embedding that is wanted for it."""
        own = weight * _accurate(counts)
        for known, total in self._wanted:
            if known is source:
                total += own
                return
        self._wanted.append((source, own))

    def parts(self) -> Iterator["EmbeddingPart"]:
        counts = sum(own for _, own in self._wanted)
        width = self._wanted[0][0].shape[1]
        for rows in counts.nonzero()[:, 0].split(max(1, PART // width)):
            outputs = sum(own[rows, None] * _accurate(w[rows]) for w, own in self._wanted)
            yield EmbeddingPart(self._weight, rows, counts[rows, None], outputs)


@dataclass(frozen=True)
class EmbeddingPart(Part):
    """Of some tokens."""

    input_axis = None
    weight: str
    rows: Tensor  # their numbers
    counts: Tensor  # [tokens, 1]
    outputs: Tensor  # Σ y, [tokens, hidden]

    def index(self, name: str, tensor: Tensor, behind: int = 0) -> tuple:
        return _along(-2, self.rows, tensor, behind)

    def product(self, weights: Weights) -> Weights:
        return {self.weight: self.counts * weights[self.weight]}

    def target(self) -> Weights:
        return {self.weight: self.outputs}

    def diagonal(self) -> Weights:
        return {self.weight: self.counts}


class NormObjective(LayerObjective, Part):
    """Σ ½ ‖x * w + b - y‖² for a weight and a bias of shape [dimensions]; one part, since it is
    small."""

    input_axis = None

    def __init__(self, weight: str, bias: str | None):
        self._weight, self._bias = weight, bias
        self._sums: dict[str, Tensor | float] = dict.fromkeys(("xx", "x", "1", "xy", "y"), 0.0)

    def add(self, inputs: Tensor, outputs: Tensor, weight: float) -> None:
        """Normalised inputs [T, dimensions] and the outputs that are wanted for them."""
        x, y = _accurate(inputs), _accurate(outputs)
        terms = {"xx": x * x, "x": x, "1": torch.ones_like(x), "xy": x * y, "y": y}
        for name, term in terms.items():
            self._sums[name] = self._sums[name] + weight * term.sum(0)

    def parts(self) -> Iterator["NormObjective"]:
        yield self

    def index(self, name: str, tensor: Tensor, behind: int = 0) -> tuple:
        return (...,)

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
