"""The coefficient-training stage."""

from mergekit_dam.fit.stage import fit, forget

__all__ = ["fit", "forget"]
