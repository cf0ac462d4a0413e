"""The least-squares start: each layer's best coefficients, without a gradient through the model."""

from mergekit_dam.least_squares.memory import StartNeeds, start_needs
from mergekit_dam.least_squares.rows import split
from mergekit_dam.least_squares.walk import least_squares

__all__ = ["StartNeeds", "least_squares", "split", "start_needs"]
