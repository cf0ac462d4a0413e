from mergekit_dam.least_squares.walk import least_squares
__all__ = ["least_squares"]
