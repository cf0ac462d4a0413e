"""What a fit keeps in memory, and which settings fit into what is free."""

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from transformers import PretrainedConfig

from mergekit_dam.config import Settings
from mergekit_dam.data import SourceData
from mergekit_dam.model import Recompute, Skeleton
from mergekit_dam.model.activations import Activations, measure

SHARE = 0.5  # of the free memory that activations may take, by the choice of `auto`


@dataclass(frozen=True)
class Needs:
    """Of a step, in bytes, without the sources."""

    tokens: int  # of all sources' rows
    kept: Activations  # for each token
    weights: int  # of the merged model
    block: int  # of its largest block

    def of(self, recompute: Recompute) -> int:
        """What lives between forward and backward, and the weights and gradients of a block."""
        if recompute == "none":
            return int(self.tokens * self.kept.all) + self.weights + self.block
        if recompute == "weights":
            return int(self.tokens * self.kept.all) + 3 * self.block
        return int(self.tokens * (self.kept.inputs + self.kept.largest)) + 3 * self.block


def needs(
    config: PretrainedConfig,
    skeleton: Skeleton,
    dtype: torch.dtype,
    tokens: int,
    *,
    trust_remote_code: bool = False,
) -> Needs:
    sizes = [
        sum(parameter.numel() for parameter in block.parameters()) for _, block in skeleton.blocks()
    ]
    return Needs(
        tokens=tokens,
        kept=measure(config, dtype, trust_remote_code=trust_remote_code),
        weights=sum(sizes) * dtype.itemsize,
        block=max(sizes) * dtype.itemsize,
    )


def longest_step(settings: Settings, data: Sequence[SourceData]) -> int:
    """Tokens of a step whose rows are the longest."""
    return settings.batch_size * sum(max(len(row) for row in own.train) for own in data)


def choose_recompute(settings: Settings, found: Needs, free: int) -> tuple[Recompute, str]:
    """The fastest way that fits, and a sentence about it. All ways give the same gradients."""
    if settings.recompute != "auto":
        return settings.recompute, ""
    limit = SHARE * free
    modes: tuple[Recompute, ...] = ("none", "weights", "block")
    mode = next((m for m in modes if found.of(m) <= limit), "block")
    return mode, (
        f"recompute: {mode}, with about {size(found.of(mode))} for a step, of {size(free)} free "
        "beside the sources"
    )


def free_memory(device: str) -> int:
    """Bytes that are free on a device now."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
