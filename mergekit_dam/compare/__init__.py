"""All merges of the same sources on the same held-out rows, with what each of them cost."""

from mergekit_dam.compare.stage import compare

__all__ = ["compare"]
