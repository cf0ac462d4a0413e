"""(c) One weak specialist among strong ones: it has hardly begun to learn its skill."""

from pathlib import Path

import making


def make(folder: Path, seed: int) -> Path:
    strong = making.specialists(["reverse", "sort", "max"])
    weak = making.specialists(["double"], steps=60)
    return making.make(folder, seed, [*strong, *weak])


if __name__ == "__main__":
    making.main(__doc__, make)
