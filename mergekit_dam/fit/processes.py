"""The processes that share a fit, as torchrun and `accelerate launch` tell them."""

import os


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_this_machine() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """Only one process writes the coefficient file and prints the table."""
    return rank() == 0
