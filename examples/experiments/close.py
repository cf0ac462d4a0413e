"""(b) The same skills, learnt a little on a base that knows them: averaging is strong there."""

from pathlib import Path

import making

SKILLS = ["reverse", "sort", "max", "double"]


def make(folder: Path, seed: int) -> Path:
    sources = making.specialists(SKILLS, steps=100, rate=3e-4)
    base = making.mixture([making.SKILLS[name] for name in SKILLS], copying=0.1)
    return making.make(folder, seed, sources, base=base, base_steps=800)


if __name__ == "__main__":
    making.main(__doc__, make)
