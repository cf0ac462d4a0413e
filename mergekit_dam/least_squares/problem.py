"""A layer's objective as a function of its coefficients.

The objective is quadratic in the weights, and these are affine in the coefficients (`formula`),
so its gradient is the one that a fit computes: A(W) - B, reduced to the coefficients.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.formula import combine_all
from mergekit_dam.inputs import Inputs
from mergekit_dam.least_squares.objective import LayerObjective, Part, Weights

Coefficients = dict[str, Tensor]  # output tensor -> [n, *B], of the n sources that have it


class Problem:
    """The sum of its parts: what is made on the way is never larger than one of them."""

    def __init__(
        self,
        objective: LayerObjective,
        inputs: Mapping[str, Inputs],  # of the layer's output tensors
        dtype: torch.dtype = torch.float32,
    ):
        self._parts = [_Outputs(part, inputs, dtype) for part in objective.parts()]
        self._blocks: Coefficients = {}

    def beside(self, origin: Coefficients) -> Callable[[Coefficients], float]:
        """f less f(origin), as a function: of sources close to each other both differ by less than
        their own rounding."""
        slope = self.gradient(origin)

        def difference(coefficients: Coefficients) -> float:
            step = {name: c - origin[name] for name, c in coefficients.items()}
            bent = self.curvature(step)
            terms = (step[name].double() * (g + bent[name] / 2) for name, g in slope.items())
            return float(sum(term.sum() for term in terms))

        return difference

    def gradient(self, coefficients: Coefficients) -> Coefficients:
        """df/dc."""
        return self._sum(_Outputs.gradient, coefficients)

    def curvature(self, step: Coefficients) -> Coefficients:
        """The second derivative's product with a step."""
        return self._sum(_Outputs.curvature, step)

    def blocks(self, coefficients: Coefficients) -> Coefficients:
        """Output tensor -> [*B, n, n]: the second derivatives of the coefficients that stand at one
        place, one from each source. They are the same for all coefficients of these shapes, and
        made once."""
        if not self._blocks:
            self._blocks = {
                name: c.new_zeros(*c.shape[1:], len(c), len(c)) for name, c in coefficients.items()
            }
            for part in self._parts:
                for name, own in part.cut(coefficients).items():
                    index = part.part.index(name, self._blocks[name], behind=2)
                    self._blocks[name][index] += part.blocks(name, tuple(own.shape[1:]))
        return self._blocks

    def _sum(self, derivative: Callable, coefficients: Coefficients) -> Coefficients:
        result = {name: torch.zeros_like(c) for name, c in coefficients.items()}
        for part in self._parts:
            for name, own in derivative(part, part.cut(coefficients)).items():
                result[name][part.part.index(name, result[name])] += own
        return result


@dataclass(frozen=True)
class _Outputs:
    """Some outputs of the layer; coefficients are those that they have."""

    part: Part
    all_inputs: Mapping[str, Inputs]
    dtype: torch.dtype

    def cut(self, tensors: Coefficients) -> Coefficients:
        return {name: self._cut(name, tensor) for name, tensor in tensors.items()}

    def gradient(self, coefficients: Coefficients) -> Coefficients:
        def slope(weights: Weights) -> Weights:
            products, target = self.part.product(weights), self.part.target()
            return {name: product.sub_(target[name]) for name, product in products.items()}

        return self._reduced(coefficients, slope)

    def curvature(self, step: Coefficients) -> Coefficients:
        def along(weights: Weights) -> Weights:
            bases = {name: self._inputs(name).base for name in weights}
            linear = {n: w if bases[n] is None else w - bases[n] for n, w in weights.items()}
            return self.part.product(linear)

        return self._reduced(step, along)

    def blocks(self, name: str, shape: tuple[int, ...]) -> Tensor:  # shape is B
        differences, axis = self._differences(name), self.part.input_axis
        blocks = differences[0].new_empty(*shape, len(differences), len(differences))
        for row, difference in enumerate(differences):
            if axis is not None and len(shape) > 1 and shape[axis] == 1:  # it sums what A mixes
                product = self.part.product(self._alone(name, difference))[name]
            else:
                product = self.part.diagonal()[name] * difference
            for column, other in enumerate(differences[: row + 1]):
                entry = (product * other).sum_to_size(shape)
                blocks[..., row, column] = blocks[..., column, row] = entry
        return blocks

    def _inputs(self, name: str) -> Inputs:
        return self.all_inputs[name].each(lambda tensor: self._cut(name, tensor))

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        return tensor[self.part.index(name, tensor)]

    def _weights(self, coefficients: Coefficients) -> Weights:
        inputs = [self._inputs(name) for name in coefficients]
        made = combine_all(list(coefficients.values()), inputs, [self.dtype] * len(inputs))
        return dict(zip(coefficients, made, strict=True))

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

    def _alone(self, name: str, weight: Tensor) -> Weights:
        """One tensor of the layer, the others zero."""
        return {
            other: weight
            if other == name
            else torch.zeros_like(self._inputs(other).sources[0], dtype=self.dtype)
            for other in self.all_inputs
        }

    def _differences(self, name: str) -> list[Tensor]:  # D_i
        parts, subtracted = self._inputs(name).parts
        base = 0 if subtracted is None else subtracted.to(self.dtype)
        return [part.to(self.dtype) - base for part in parts]
