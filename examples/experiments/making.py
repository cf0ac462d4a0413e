"""What the scenarios share: skills, training, and the config of their merge.

A scenario is a script beside this module; it makes a base, its specialists and their rows from a
seed, and writes a config for `mergekit-dam compare`.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers.utils import logging as progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))

import make_specialists as quickstart
from evaluate import Row

ROWS = 1200  # of each skill; some of them are held out by the config
HELD_OUT = 0.15
SMALL = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3}  # 0.15M parameters
SHARE = 1.0  # of all steps; less makes a scenario quickly and badly
STEPS, RATE = 600, 3e-3  # of a specialist that ends far from its base
Draw = quickstart.Draw


def draw_min(rng: random.Random) -> Row:
    numbers = [rng.randrange(10, 100) for _ in range(rng.randint(3, 4))]
    return {"prompt": f"min {' '.join(map(str, numbers))}=", "completion": str(min(numbers))}


def draw_double(rng: random.Random) -> Row:
    text = quickstart.letters(rng)
    return {"prompt": f"double {text}=", "completion": "".join(2 * letter for letter in text)}


def draw_swap(rng: random.Random) -> Row:
    text = quickstart.letters(rng)
    return {"prompt": f"swap {text}=", "completion": text[-1] + text[1:-1] + text[0]}


def draw_next(rng: random.Random) -> Row:
    text = quickstart.letters(rng)
    following = "".join(chr((ord(letter) - ord("a") + 1) % 26 + ord("a")) for letter in text)
    return {"prompt": f"next {text}=", "completion": following}


def draw_rotate(rng: random.Random) -> Row:
    text = quickstart.letters(rng)
    return {"prompt": f"rotate {text}=", "completion": text[1:] + text[0]}


SKILLS: dict[str, Draw] = {
    "reverse": quickstart.draw_reverse,
    "sort": quickstart.draw_sort,
    "max": quickstart.draw_max,
    "double": draw_double,
    "min": draw_min,
    "swap": draw_swap,
    "next": draw_next,
    "rotate": draw_rotate,
    "add": quickstart.draw_add,  # wants more width than the others
}


@dataclass(frozen=True)
class Specialist:
    """One source: what it learns, and how hard."""

    name: str
    draw: Draw
    steps: int = STEPS
    rate: float = RATE


def specialists(names: Sequence[str], **how: float) -> list[Specialist]:
    return [Specialist(name, SKILLS[name], **how) for name in names]


def mixture(draws: Sequence[Draw], copying: float = 0.5) -> Draw:
    """The base's rows: a share of copying, a little of everything else."""

    def draw(rng: random.Random) -> Row:
        return quickstart.draw_copy(rng) if rng.random() < copying else rng.choice(draws)(rng)

    return draw


Adapt = Callable[[torch.nn.Module, Path], torch.nn.Module]


def make(
    folder: Path,
    seed: int,
    sources: Sequence[Specialist],
    *,
    base: Draw | None = None,
    base_steps: int = STEPS,
    batch: int = 32,
    characters: str = quickstart.CHARACTERS,
    changes: Mapping[str, object] = SMALL,
    adapt: Adapt | None = None,
) -> Path:
    """Write the checkpoints, the rows and the config; return the config's path.

    `adapt` puts an adapter on the base, which is trained and saved in the place of the weights.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    rng = random.Random(seed)
    rows = {s.name: quickstart.distinct_rows(s.draw, rng, ROWS) for s in sources}
    for name, own in rows.items():
        quickstart.write_rows(folder / "data" / f"{name}.jsonl", own)
    known = {row["prompt"] for own in rows.values() for row in own}
    tokenizer = quickstart.make_tokenizer(characters)
    tokenizer.model_max_length = changes.get("max_position_embeddings", 64)
    progress.disable_progress_bar()

    def batches(draw: Draw):
        """No row that the merge is calibrated with or measured on is trained on."""
        return quickstart.batches(draw, rng, known, tokenizer, batch)

    model = quickstart.make_model(tokenizer, **changes)
    draw_base = base or mixture([source.draw for source in sources])
    quickstart.train(model, batches(draw_base), _some(base_steps), RATE)
    quickstart.save(model, tokenizer, folder / "base")
    names = {}
    for source in sources:
        place, own = folder / source.name, copy.deepcopy(model)
        own = own if adapt is None else adapt(own, folder / "base")
        quickstart.train(own, batches(source.draw), _some(source.steps), source.rate)
        if adapt is None:
            quickstart.save(own, tokenizer, place)
        else:
            own.save_pretrained(place)
        names[source.name] = str(place) if adapt is None else f"{folder / 'base'}+{place}"
    return _write_config(folder, names, seed)


def _some(steps: int) -> int:
    return max(2, round(SHARE * steps))


def _write_config(folder: Path, names: Mapping[str, str], seed: int) -> Path:
    data = [
        {"source": name, "path": str(folder / "data" / f"{skill}.jsonl")}
        for skill, name in names.items()
    ]
    document = {
        "merge_method": "dam",
        "base_model": str(folder / "base"),
        "models": [{"model": name} for name in names.values()],
        "parameters": {"coefficients": str(folder / "dam.safetensors")},
        "dtype": "bfloat16",
        "dam": {"data": data, "held_out": HELD_OUT, "seed": seed},
    }
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path


def main(describe: str, make_scenario: Callable[[Path, int], Path]) -> None:
    """The command line of every scenario."""
    parser = argparse.ArgumentParser(description=describe)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.perf_counter()
    config = make_scenario(args.out, args.seed)
    print(f"{config} ({time.perf_counter() - started:.0f} seconds)")
