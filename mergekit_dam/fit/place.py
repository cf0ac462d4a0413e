"""Where a fit keeps the sources and what it makes again, by what is free."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mergekit_dam.config import Settings
from mergekit_dam.errors import DamError
from mergekit_dam.fit.memory import Needs, free_memory, size
from mergekit_dam.model import Offload, Recompute, Skeleton

# What `auto` lets take of the free memory: a step, and the sources.
STEP = 0.5
SOURCES = 0.7


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
    settings: Settings, device: str, sources: int, free: int, host: int, step: int = 0
) -> tuple[Offload, str]:
    """Where the sources' weights live, and a sentence about it. The results are the same.

    `sources` are their bytes; `free` those of the device and `host` those of the machine's memory;
    `step` what a step takes there at least.
    """
    if settings.offload != "auto":
        return settings.offload, ""
    if sources <= SOURCES * free and sources + step <= free:
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
    sources: int  # on the device
    step: int  # there, too
    free: int  # there, before
    mapped: int  # files of the sources that are read where they lie, through the page cache
    host: int  # beside a GPU
    told: tuple[str, ...]  # sentences about what `auto` chose

    def __str__(self) -> str:
        host = f", and {size(self.host)} of host memory" if self.host else ""
        mapped = (
            f", beside {size(self.mapped)} of files that the system may drop" if self.mapped else ""
        )
        return (
            f"on {self.device}: recompute: {self.recompute}, offload: {self.offload}, takes "
            f"{size(self.sources + self.step)}{mapped}{host}"
        )


def place(
    settings: Settings, device: str, found: Needs, sources: int, groups: Sequence[int]
) -> Place:
    """Where a fit keeps what it needs here. `sources` are the bytes of all their tensors, `groups`
    those for each block, in the order of the forward pass."""
    free, host = free_memory(device), host_memory()
    is_cuda = torch.device(device).type == "cuda"
    least = found.of("block" if settings.recompute == "auto" else settings.recompute)
    offload, why = choose_offload(settings, device, sources, free, host, least if is_cuda else 0)
    there = {"none": sources if is_cuda else 0, "disk": max(groups, default=0)}
    there["cpu"] = _most_together(groups) if is_cuda else 0
    recompute, how = choose_recompute(settings, found, free - there[offload])
    return Place(
        device=device,
        recompute=recompute,
        offload=offload,
        sources=there[offload],
        step=found.of(recompute),
        free=free,
        mapped=0 if is_cuda or offload == "disk" else sources,
        host=sources if is_cuda and offload == "cpu" else 0,
        told=tuple(filter(None, (why, how))),
    )


def _most_together(groups: Sequence[int]) -> int:
    """Of a block, of the one that is copied for later, and of the one before, whose memory is free
    when the GPU is done with it."""
    return max(sum(groups[start : start + 3]) for start in range(len(groups))) if groups else 0


def groups_of(skeleton: Skeleton, sizes: Mapping[str, int]) -> list[int]:
    """For each block, of the output tensors that its weights are made of."""
    return [
        sum(sizes.get(name, 0) for name in skeleton.inputs(path)) for path, _ in skeleton.blocks()
    ]


def require_memory(found: Place, settings: Settings) -> None:
    """Raises DamError for a step that cannot fit, before anything is computed."""
    free = found.free - found.sources
    if found.step <= free:
        return
    remedies = {
        "`dam.recompute: block`": settings.recompute not in ("auto", "block"),
        "`dam.offload: cpu`": found.offload == "none" and torch.device(found.device).type == "cuda",
        "`dam.offload: disk`": found.offload == "cpu" and found.sources > free,
        "a smaller `dam.batch_size` or `dam.max_length`": True,
    }
    remedy = next(setting for setting, helps in remedies.items() if helps)
    raise DamError(
        f"A step needs about {size(found.step)} of memory beside the sources, and "
        f"{size(max(free, 0))} are free on {found.device}: set {remedy}."
    )


def host_memory() -> int:
    """This process' share of what is free beside the GPUs: each of several keeps the sources."""
    return free_memory("cpu") // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
