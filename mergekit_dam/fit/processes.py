"""The processes that share a fit, as torchrun and `accelerate launch` tell them."""

import logging
import os
import time
from collections.abc import Callable, Iterator

from mergekit_dam.errors import DamError

LOG = logging.getLogger(__name__)
PATIENCE = 60  # seconds without a word
LIMIT = 24 * 3600  # what a merge or the writing of rows takes at most
# What `accelerate config` may have chosen, and its values that leave a model as it is.
WRAPPERS = {
    "ACCELERATE_USE_FSDP": "false",
    "ACCELERATE_USE_DEEPSPEED": "false",
    "ACCELERATE_USE_MEGATRON_LM": "false",
    "ACCELERATE_DYNAMO_BACKEND": "no",
}


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_this_machine() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """Only one process writes the coefficient file and prints the table."""
    return rank() == 0


def launch_problems() -> Iterator[str]:
    """What `accelerate launch` is to do with the model that a fit cannot have."""
    for name, plain in WRAPPERS.items():
        if (value := os.environ.get(name, plain)).lower() not in (plain, "0", ""):
            yield (
                f"`accelerate launch` is set up with {name}={value}, but a fit's processes share "
                "rows and nothing else: leave that out, or launch with torchrun"
            )


def rank_here() -> int:
    """Among the processes on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def wait_for(path: object, is_there: Callable[[], bool], pause: float = 0.5) -> None:
    """Wait for what the main process makes: a file or folder that appears when it is whole.

    Where the main process fails, torchrun ends this one too. Raises DamError where torchrun itself
    is gone, or nothing comes.
    """
    begin, launcher, has_told = time.monotonic(), os.getppid(), False
    while not is_there():
        waited = time.monotonic() - begin
        if os.getppid() != launcher:
            raise DamError(
                f"{path} was not made: what launched the processes has ended; start again."
            )
        if waited > LIMIT:
            raise DamError(
                f"{path} did not appear within {LIMIT // 3600} hours: look what the main process "
                "does, and whether all processes see the same disk."
            )
        if waited > PATIENCE and not has_told:
            LOG.warning("Process %d waits for %s, which the main process makes.", rank(), path)
            has_told = True
        time.sleep(pause)
