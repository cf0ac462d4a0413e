"""The coefficient-training stage."""

from mergekit_dam.fit.stage import fit

__all__ = ["fit"]
