"""Where a fit computes, and in which dtype."""

import os

import torch
from transformers import PretrainedConfig

from mergekit_dam.config import Settings
from mergekit_dam.errors import DamError
from mergekit_dam.model import SourceWeights

# Below this width a second thread waits longer for the first than it computes, and on a machine
# with other work many times longer.
NARROW = 512


def choose_device(name: str) -> str:
    """Under torchrun each process has a GPU of its own, the one that the Trainer takes too."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise DamError(f"--device {name} is no device for a fit: use cpu, cuda or auto.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise DamError(f"--device {name}: torch sees no CUDA device here; use --device cpu.")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name


def choose_threads(config: PretrainedConfig, device: str, wanted: int | None) -> None:
    """One thread for narrow models on the CPU, unless --num-threads says otherwise. A rule by
    size, since results depend on the number of threads in their last bits."""
    if device == "cpu" and wanted is None and config.get_text_config().hidden_size < NARROW:
        torch.set_num_threads(1)


def choose_dtype(settings: Settings, weights: SourceWeights, device: str) -> torch.dtype:
    if settings.compute_dtype != "auto":
        return getattr(torch, settings.compute_dtype)
    dtypes = {weights[name].dtype for name in weights.names()}
    if device == "cpu" or torch.float32 in dtypes:
        return torch.float32
    return torch.bfloat16
