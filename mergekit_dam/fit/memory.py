"""What a fit keeps in memory, and which settings fit into what is free."""

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from transformers import PretrainedConfig

from mergekit_dam.config import Settings
from mergekit_dam.config.settings import Objective
from mergekit_dam.data import SourceData
from mergekit_dam.errors import DamError
from mergekit_dam.fit.chunks import slices
from mergekit_dam.model import Offload, Recompute, Skeleton
from mergekit_dam.model.activations import Activations, measure
from mergekit_dam.plan import Plan

# What `auto` lets take of the free memory: a step, and the sources.
STEP = 0.5
SOURCES = 0.7
# Of the logits, in float32, for each term: at most, and until it is differentiated. For `kl` the
# log-probabilities of merge and source, and their distance and two steps of its gradient.
COPIES = {"kl": (5, 2), "reverse_kl": (5, 2), "jsd": (7, 3), "mse": (1, 0), "entropy": (3, 1)}


@dataclass(frozen=True)
class Needs:
    """Of a step, in bytes, without the sources. Which tensors live at a peak was found by listing
    them (docs/performance.md)."""

    tokens: int  # of all sources' rows
    kept: Activations  # for each token
    states: int  # the final hidden states of the tokens
    blocks: int  # the merged weights of all blocks but embedding and head
    block: int  # of the largest of them
    matrix: int  # its largest tensor
    head: int = 0  # the head's merged weights, and their gradients in float32
    losses: int = 0  # of a chunk of tokens, from the logits to their gradients
    coefficients: int = 0  # their gradients, and their products in the terms that compare them
    parameters: int = 0  # how many numbers the matrices of all blocks and the head have

    def of(self, recompute: Recompute) -> int:
        """The peak: while the head's losses are computed, or gradients of a block's weights."""
        kept = self.tokens * (self.kept.inputs if recompute == "block" else self.kept.all)
        held = self.blocks if recompute == "none" else 0
        at_head = self.head + self.losses + 3 * self.states
        return int(kept + held + self.coefficients + max(at_head, self._in_a_block(recompute)))

    def _in_a_block(self, recompute: Recompute) -> float:
        largest, passing = self.tokens * self.kept.largest, 2 * self.tokens * self.kept.widest
        if recompute == "block":  # a weight goes when its gradient comes
            return largest + passing + self.block + self.matrix
        if recompute == "weights":  # made again, they stay until all their gradients are there
            return passing + 2 * self.block - largest
        return self.matrix


def needs(
    config: PretrainedConfig,
    skeleton: Skeleton,
    dtype: torch.dtype,
    rows: Sequence[int],  # of each source, the tokens of a step
    objective: Objective,
    coefficients: int = 0,  # how many are trained
    *,
    trust_remote_code: bool = False,
) -> Needs:
    model = skeleton.model  # what its ends take, the losses between them take more
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    own = [block for _, block in skeleton.blocks() if not any(block is end for end in ends)]
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in own]
    text = config.get_text_config()
    vocabulary, width = text.vocab_size, text.hidden_size
    largest = own[sizes.index(max(sizes))]
    return Needs(
        tokens=sum(rows),
        kept=measure(config, dtype, trust_remote_code=trust_remote_code),
        states=sum(rows) * width * dtype.itemsize,
        blocks=sum(sizes) * dtype.itemsize,
        block=max(sizes) * dtype.itemsize,
        matrix=max((p.numel() for p in largest.parameters()), default=0) * dtype.itemsize,
        head=vocabulary * width * (dtype.itemsize + 4),
        losses=_longest_chunk(max(rows), vocabulary) * vocabulary * _of_a_logit(objective, dtype),
        coefficients=3 * 4 * coefficients,
        parameters=sum(sizes) + vocabulary * width,
    )


def _longest_chunk(tokens: int, vocabulary: int) -> int:
    chunk = next(slices(tokens, vocabulary))
    return chunk.stop - chunk.start


def _of_a_logit(objective: Objective, dtype: torch.dtype) -> int:
    """Bytes for each number of a chunk's logits while their gradients are computed: the merge's
    and the source's, and what the terms make of them in float32. The last term is differentiated
    first."""
    most, kept = 0, 0
    for name, (working, saved) in COPIES.items():
        if getattr(objective, name):
            most, kept = max(most, kept + working), kept + saved
    return 2 * dtype.itemsize + 4 * most if most else 0


def longest_step(settings: Settings, data: Sequence[SourceData]) -> list[int]:
    """For each source, the tokens of a step whose rows are the longest."""
    return [settings.batch_size * max(len(row) for row in own.train) for own in data]


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


@dataclass(frozen=True)
class Place:
    """Where a fit keeps what it needs; bytes."""

    device: str
    recompute: Recompute
    offload: Offload
    taken: int  # on the device
    mapped: int  # files of the sources that are read where they lie, through the page cache
    host: int  # beside a GPU

    def __str__(self) -> str:
        host = f", and {size(self.host)} of host memory" if self.host else ""
        mapped = f", beside {size(self.mapped)} of mapped files" if self.mapped else ""
        return (
            f"on {self.device}: recompute: {self.recompute}, offload: {self.offload}, takes "
            f"{size(self.taken)}{mapped}{host}"
        )


def place(settings: Settings, device: str, found: Needs, sources: int, count: int) -> Place:
    """What a fit will choose here, with `count` sources of so many bytes together."""
    free, host = free_memory(device), free_memory("cpu")
    offload, _ = choose_offload(settings, device, sources, free, host)
    is_cuda = torch.device(device).type == "cuda"
    blocks = {"none": sources, "cpu": 2 * count * found.block, "disk": count * found.block}
    there = blocks[offload] if is_cuda or offload == "disk" else 0
    recompute, _ = choose_recompute(settings, found, free - there)
    return Place(
        device=device,
        recompute=recompute,
        offload=offload,
        taken=there + found.of(recompute),
        mapped=0 if is_cuda or offload == "disk" else sources,
        host=sources if is_cuda and offload == "cpu" else 0,
    )


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
