"""(a) The quickstart's skills and models: four specialists far from their base and each other."""

from pathlib import Path

import making
from making import quickstart

TRAINING = {"steps": quickstart.SKILL_STEPS, "rate": quickstart.RATE}


def make(folder: Path, seed: int) -> Path:
    sources = making.specialists(list(quickstart.SKILLS), **TRAINING)
    return making.make(
        folder, seed, sources, changes={}, base_steps=quickstart.BASE_STEPS, batch=quickstart.BATCH
    )


if __name__ == "__main__":
    making.main(__doc__, make)
