"""(f) Tied embeddings: the head is the embedding, and has no coefficients of its own."""

from pathlib import Path

import making


def make(folder: Path, seed: int) -> Path:
    sources = making.specialists(["reverse", "sort", "max"])
    return making.make(folder, seed, sources, changes={**making.SMALL, "tie_word_embeddings": True})


if __name__ == "__main__":
    making.main(__doc__, make)
