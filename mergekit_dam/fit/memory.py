"""What a fit keeps in memory, and which settings fit into what is free."""

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from transformers import PretrainedConfig

from mergekit_dam.config import Settings
from mergekit_dam.data import SourceData
from mergekit_dam.errors import DamError
from mergekit_dam.fit.chunks import CHUNK
from mergekit_dam.model import Offload, Recompute, Skeleton
from mergekit_dam.model.activations import Activations, measure
from mergekit_dam.plan import Plan

# What `auto` lets take of the free memory: a step, and the sources.
STEP = 0.5
COPIES = 9  # of a chunk's logits in the losses of merge and source, and in their gradients
SOURCES = 0.7


@dataclass(frozen=True)
class Needs:
    """Of a step, in bytes, without the sources."""

    tokens: int  # of all sources' rows
    kept: Activations  # for each token
    weights: int  # of the merged model
    block: int  # of its largest block
    head: int = 0  # the head's weights and their gradients
    logits: int = 0  # those of a chunk of tokens, in float32

    def of(self, recompute: Recompute) -> int:
        """The peak: while the head's losses are computed, or a block's gradients."""
        kept = self.tokens * (self.kept.inputs if recompute == "block" else self.kept.all)
        again = self.tokens * self.kept.largest if recompute == "block" else 0
        held = self.weights if recompute == "none" else 0
        return int(kept + held + max(self.head + COPIES * self.logits, again + 3 * self.block))


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
    text = config.get_text_config()
    vocabulary, width = text.vocab_size, text.hidden_size
    return Needs(
        tokens=tokens,
        kept=measure(config, dtype, trust_remote_code=trust_remote_code),
        weights=sum(sizes) * dtype.itemsize,
        block=max(sizes) * dtype.itemsize,
        head=vocabulary * width * (2 * dtype.itemsize + 4),
        logits=4 * min(tokens * vocabulary, CHUNK),
    )


def longest_step(settings: Settings, data: Sequence[SourceData]) -> int:
    """Tokens of a step whose rows are the longest."""
    return settings.batch_size * sum(max(len(row) for row in own.train) for own in data)


def choose_recompute(settings: Settings, found: Needs, free: int) -> tuple[Recompute, str]:
    """The fastest way that fits, and a sentence about it. All ways give the same gradients."""
    if settings.recompute != "auto":
        return settings.recompute, ""
    limit = STEP * free
    modes: tuple[Recompute, ...] = ("none", "weights", "block")
    mode = next((m for m in modes if found.of(m) <= limit), "block")
    return mode, (
        f"recompute: {mode}, with about {size(found.of(mode))} for a step, of {size(free)} free "
        "beside the sources"
    )


def choose_offload(
    settings: Settings, device: str, sources: int, free: int, host: int
) -> tuple[Offload, str]:
    """Where the sources' weights live, and a sentence about it. The results are the same.

    `sources` are their bytes; `free` those of the device and `host` those of the machine's memory.
    """
    if settings.offload != "auto":
        return settings.offload, ""
    if sources <= SOURCES * free:
        return "none", ""
    where = "GPU" if torch.device(device).type == "cuda" else "memory"
    told = f"the sources take {size(sources)}, of {size(free)} free in the {where}"
    if where == "GPU" and sources <= SOURCES * host:
        return "cpu", f"offload: cpu, since {told}; {size(host)} are free in host memory"
    return "disk", f"offload: disk, since {told}"


def size_of_sources(plan: Plan, settings: Settings) -> int:
    """Bytes of all that the fit would hold."""
    total, is_sparse = 0, settings.sparsify != "task_arithmetic"
    models = {*plan.sources, plan.base if settings.formula == "task_vectors" else None}
    for _, inputs in plan.load(plan.tensors, quiet=True):
        for tensor in (tensor for model, tensor in inputs.items() if model in models):
            total += tensor.nbytes + (4 * tensor.numel() if is_sparse else 0)
    return total


def require_memory(needed: int, free: int, settings: Settings, device: str) -> None:
    """Raises DamError for a step that cannot fit, before anything is computed."""
    if needed <= free:
        return
    remedies = {
        "`dam.recompute: block`": settings.recompute not in ("auto", "block"),
        "`dam.offload: cpu`": settings.offload == "none" and torch.device(device).type == "cuda",
        "a smaller `dam.batch_size` or `dam.max_length`": True,
    }
    remedy = next(setting for setting, helps in remedies.items() if helps)
    raise DamError(
        f"A step needs about {size(needed)} of memory beside the sources, and {size(free)} are "
        f"free on {device}: set {remedy}."
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
