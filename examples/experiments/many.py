"""(d) Two, four or eight specialists of one base."""

from functools import partial
from pathlib import Path

import making


def make(folder: Path, seed: int, count: int = 8) -> Path:
    every = list(making.SKILLS)[:8]
    base = making.mixture([making.SKILLS[name] for name in every])  # the same whatever the count
    return making.make(folder, seed, making.specialists(every[:count]), base=base)


two, four, eight = (partial(make, count=count) for count in (2, 4, 8))

if __name__ == "__main__":
    making.main(__doc__, make)
