"""(a) The quickstart's skills: four specialists far from their base and from each other."""

from pathlib import Path

import making

WIDER = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}  # for addition


def make(folder: Path, seed: int) -> Path:
    sources = making.specialists(["add", "reverse", "sort", "max"])
    return making.make(folder, seed, sources, changes=WIDER, batch=64)


if __name__ == "__main__":
    making.main(__doc__, make)
