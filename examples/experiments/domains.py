"""(e) Two text domains and a skill: Python's own source code, its manual's prose, and counting.

In the spirit of the paper's case of languages and mathematics. The texts are those that Python
itself ships, so that nothing is downloaded.
"""

import random
import string
import sysconfig
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import making
from evaluate import Row

LENGTH = 72  # characters of a row
SIZES = {**making.SMALL, "max_position_embeddings": 96}
MODULES = "argparse ast calendar difflib doctest inspect pathlib pdb pickle tarfile typing zipfile"


@cache
def code() -> str:
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = [folder / f"{name}.py" for name in MODULES.split()]
    return _plain("".join(path.read_text(encoding="utf-8") for path in names if path.exists()))


@cache
def prose() -> str:
    return _plain(" ".join(" ".join(text.split()) for text in topics.values()))


def _plain(text: str) -> str:
    return "".join(character for character in text if character in string.printable)


def piece(text: str, rng: random.Random) -> Row:
    """A row whose beginning is the prompt, so that rows are told apart by it."""
    start = rng.randrange(len(text) - LENGTH)
    return {"prompt": text[start : start + 24], "completion": text[start + 24 : start + LENGTH]}


def draw_code(rng: random.Random) -> Row:
    return piece(code(), rng)


def draw_prose(rng: random.Random) -> Row:
    return piece(prose(), rng)


def draw_counting(rng: random.Random) -> Row:
    start, step = rng.randrange(200), rng.randint(1, 9)
    numbers = [str(start + step * i) for i in range(6)]
    return {"prompt": f"count {' '.join(numbers[:2])}=", "completion": " ".join(numbers[2:])}


def make(folder: Path, seed: int) -> Path:
    draws = {"code": draw_code, "prose": draw_prose, "counting": draw_counting}
    sources = [making.Specialist(name, draw, steps=600) for name, draw in draws.items()]
    return making.make(
        folder,
        seed,
        sources,
        base=making.mixture(list(draws.values()), copying=0.1),
        base_steps=600,
        characters=string.printable,
        changes=SIZES,
    )


if __name__ == "__main__":
    making.main(__doc__, make)
