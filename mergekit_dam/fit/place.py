"""Where a fit keeps the sources and what it makes again, by what is free."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergekit_dam.config import Settings
from mergekit_dam.errors import DamError
from mergekit_dam.fit import processes
from mergekit_dam.fit.memory import Needs, free_memory, size
from mergekit_dam.least_squares import StartNeeds
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
    mode = next((m for m in modes if found.with_code(m) <= limit), "block")
    return mode, (
        f"recompute: {mode}, with about {size(found.with_code(mode))} for a step, of {size(free)} "
        "free beside the sources"
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
    step: int  # there, too; 0 without steps
    start: int  # there before the first step; 0 for one that computes nothing
    free: int  # there, before
    mapped: int  # files of the sources that are read where they lie, through the page cache
    host: int  # beside a GPU
    free_host: int
    waiting: int  # of the sources on the device: a block that has gone when the GPU is done with it
    told: tuple[str, ...]  # sentences about what `auto` chose

    @property
    def needed(self) -> int:
        """On the device, at most at once."""
        return self.sources + max(self.step, self.start)

    @property
    def taken(self) -> int:
        """Of that, what is in use at a time: by the start, the waiting block, too."""
        of_start = self.sources + self.start if self.start else 0
        return max(self.sources - self.waiting + self.step, of_start)

    @property
    def fits(self) -> bool:
        return self.needed <= self.free and self.host <= self.free_host

    def __str__(self) -> str:
        host = f", and {size(self.host)} of host memory" if self.host else ""
        mapped = (
            f", beside {size(self.mapped)} of files that the system may drop" if self.mapped else ""
        )
        return (
            f"on {self.device}: recompute: {self.recompute}, offload: {self.offload}, takes "
            f"{size(self.taken)}{mapped}{host}"
        )


def place(
    settings: Settings,
    device: str,
    found: Needs,
    sources: int,
    groups: Sequence[int],
    start: StartNeeds | None = None,
    *,
    made: int = 0,
    own: float = 0,
    is_cast: bool = False,
) -> Place:
    """Where a fit keeps what it needs here. `sources` are the bytes of all their tensors, `made`
    those that no file holds as they are, `groups` those for each block, in the order of the forward
    pass, `own` the share of the sources that are held once more as models of their own; with
    `is_cast`, what the start computes with is of another dtype."""
    is_cuda, host = torch.device(device).type == "cuda", host_memory()
    free = free_memory(device) if is_cuda else host
    least = found.with_code("block" if settings.recompute == "auto" else settings.recompute)
    least = max(least * bool(settings.max_steps), start.of(is_copied=is_cast) if start else 0)
    offload, why = choose_offload(settings, device, sources, free, host, least if is_cuda else 0)
    there = {
        "none": sources if is_cuda else made,
        "cpu": int(_most_of(3, groups) * (1 + own)) if is_cuda else made,
        "disk": int(max(groups, default=0) * (1 + own)),
    }
    recompute, how = choose_recompute(settings, found, free - there[offload])
    is_copied = is_cast or (is_cuda and offload == "disk")
    is_fetched = is_cuda and offload == "cpu"
    return Place(
        device=device,
        recompute=recompute,
        offload=offload,
        sources=there[offload],
        step=found.with_code(recompute) if settings.max_steps else 0,
        start=start.of(is_copied=is_copied) if start else 0,
        free=free,
        mapped=0 if is_cuda or offload == "disk" else sources - made,
        host=sources if is_fetched else 0,
        free_host=host,
        waiting=there["cpu"] - int(_most_of(2, groups) * (1 + own)) if is_fetched else 0,
        told=tuple(filter(None, (why, how if settings.max_steps else ""))),
    )


def _most_of(count: int, groups: Sequence[int]) -> int:
    """Of so many blocks that follow each other: one that computes, the next, which is copied for
    later, and the one before, whose memory is free when the GPU is done with it."""
    return max(sum(groups[start : start + count]) for start in range(len(groups))) if groups else 0


def groups_of(skeleton: Skeleton, sizes: Mapping[str, int]) -> list[int]:
    """For each block, of the output tensors that its weights are made of."""
    return [
        sum(sizes.get(name, 0) for name in skeleton.inputs(path)) for path, _ in skeleton.blocks()
    ]


def require_memory(found: Place, settings: Settings, again: Callable[[Settings], Place]) -> None:
    """Raises DamError for a fit that cannot have what it needs, before anything is computed."""
    if told := lack(found, settings, again):
        raise DamError(told)


def lack(found: Place, settings: Settings, again: Callable[[Settings], Place]) -> str | None:
    """What a fit lacks here, if anything, and the first change of its settings that helps, by
    `again`: where a fit with other settings would be."""
    if found.fits:
        return None
    changes = next((c for c in remedies(settings, found) if again(_changed(settings, c)).fits), {})
    told = " and ".join(f"`dam.{key}: {value}`" for key, value in changes.items())
    remedy = f"set {told}" if told else "no setting would fit"
    if found.needed <= found.free:
        return (
            f"The sources need {size(found.host)} of host memory beside the GPU, and "
            f"{size(found.free_host)} are free: {remedy}."
        )
    if found.sources > found.free:
        return (
            f"The sources need {size(found.sources)} of memory on {found.device}, and "
            f"{size(found.free)} are free: {remedy}."
        )
    free = size(found.free - found.sources)
    if found.start > found.step:
        return (
            f"The least-squares start needs about {size(found.start)} of memory beside the "
            f"sources, and {free} are free on {found.device}: {remedy}."
        )
    return (
        f"A step needs about {size(found.step)} of memory beside the sources, and {free} are free "
        f"on {found.device}: {remedy}."
    )


def _changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    return settings.model_copy(update=changes)


def remedies(settings: Settings, found: Place) -> Iterator[dict[str, Any]]:
    """Changes of settings that take less memory, the least first."""
    changes = {}
    if settings.recompute not in ("auto", "block"):
        changes["recompute"] = "block"
        yield dict(changes)
    if settings.offload not in ("auto", "disk"):
        for offload in ("cpu", "disk") if settings.offload == "none" else ("disk",):
            yield {"offload": offload}
            if changes:
                yield {**changes, "offload": offload}
        changes["offload"] = "disk"
    if found.start > found.step:
        for rows in _halves(settings.calibration_rows, 8):
            yield {**changes, "calibration": rows}
        yield {**changes, "start": "average"}
    for rows in _halves(settings.batch_size, 1):
        yield {**changes, "batch_size": rows}
    if settings.batch_size > 1:
        changes["batch_size"] = 1
    for length in _halves(settings.max_length, 64):
        yield {**changes, "max_length": length}


def _halves(number: int, least: int) -> Iterator[int]:
    while number // 2 >= least:
        number //= 2
        yield number


def host_memory() -> int:
    """This process' share of what is free beside the GPUs: each of several keeps the sources."""
    return free_memory("cpu") // processes.on_this_machine()
