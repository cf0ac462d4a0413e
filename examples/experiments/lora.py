"""(g) LoRA specialists: adapters of one base, which mergekit merges into it first."""

from pathlib import Path

import making
from peft import LoraConfig, get_peft_model


def adapt(model, base: Path):
    """An adapter on every linear layer."""
    model.name_or_path = str(base)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def make(folder: Path, seed: int) -> Path:
    sources = making.specialists(
        ["reverse", "sort", "max"], rate=5e-3
    )  # adapters want a higher one
    return making.make(folder, seed, sources, adapt=adapt)


if __name__ == "__main__":
    making.main(__doc__, make)
