"""Where a fit computes, and in which dtype."""

from collections.abc import Collection

import torch
from accelerate.utils import parse_flag_from_env
from transformers import PretrainedConfig

from mergekit_dam.config import Settings
from mergekit_dam.errors import DamError
from mergekit_dam.fit import processes

# Below this width a second thread waits longer for the first than it computes, and on a machine
# with other work many times longer.
NARROW = 512


def choose_device(name: str) -> str:
    """The CPU, or a GPU with its number. Raises DamError for what is no device of this machine."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and not _is_for_cpu() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise DamError(f"--device {name} is no device for a fit: use cpu, cuda or auto.")
    return _own_gpu(name) if kind == "cuda" else name


def _own_gpu(name: str) -> str:
    """Under torchrun each process has one of its own, the one that the Trainer takes too."""
    if not torch.cuda.is_available():
        raise DamError(f"--device {name}: torch sees no CUDA device here; use --device cpu.")
    if _is_for_cpu():
        raise DamError(
            f"--device {name}: accelerate is set up for the CPU (ACCELERATE_USE_CPU); leave that "
            "out, or use --device cpu."
        )
    own = f"cuda:{processes.rank_here() % torch.cuda.device_count()}"
    if name not in ("cuda", own):
        raise DamError(
            f"--device {name}: a fit takes the first GPU that it sees; set CUDA_VISIBLE_DEVICES="
            f"{name.partition(':')[2]} and give --device cuda."
        )
    return own


def _is_for_cpu() -> bool:
    """As `accelerate launch --cpu` says it, to which the Trainer listens."""
    return parse_flag_from_env("ACCELERATE_USE_CPU")


def take(device: str) -> None:
    """What is meant for the current GPU goes to this one."""
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)


def choose_threads(config: PretrainedConfig, device: str, wanted: int | None) -> None:
    """One thread for narrow models on the CPU, unless --num-threads says otherwise. A rule by
    size, since results depend on the number of threads in their last bits."""
    if device == "cpu" and wanted is None and config.get_text_config().hidden_size < NARROW:
        torch.set_num_threads(1)


def choose_dtype(settings: Settings, dtypes: Collection[torch.dtype], device: str) -> torch.dtype:
    """`dtypes` are those of the merged tensors."""
    if settings.compute_dtype != "auto":
        return getattr(torch, settings.compute_dtype)
    if device == "cpu" or torch.float32 in dtypes:
        return torch.float32
    return torch.bfloat16
