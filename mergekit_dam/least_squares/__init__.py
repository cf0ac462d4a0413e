"""The least-squares start: each layer's best coefficients, without a gradient through the model."""

from mergekit_dam.least_squares.walk import CHECKED, least_squares

__all__ = ["CHECKED", "least_squares"]
