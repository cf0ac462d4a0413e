"""Where the sources' weights live while the fit does not compute with them.

`Held`: on the device. `OnDisk`: in the checkpoints' files, from which a block's tensors are
gathered each time it needs them. `InHostMemory`: beside the GPU, from where a block's tensors are
copied, those of the next block while this one computes. What is computed is the same.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from mergekit_dam.errors import DamError
from mergekit_dam.inputs import Inputs, rows_of

Offload = Literal["none", "cpu", "disk"]
ALIGNMENT = 512  # bytes, of a tensor in an arena

Read = Callable[[Collection[str]], Mapping[str, Inputs]]


class Held:
    """All on the device. On the CPU they stay the memory-mapped files of the checkpoints."""

    def __init__(self, device: torch.device, read: Read):
        self._device, self._inputs = device, {}

    def put(self, name: str, inputs: Callable[[], Inputs]) -> None:
        self._inputs[name] = inputs().each(lambda tensor: tensor.to(self._device))

    def group(self, groups: Iterable[Collection[str]]) -> None:
        """Which tensors are needed together."""

    def get(self, name: str, ids: Tensor | None = None) -> Inputs:
        """On the device; with `ids` these rows alone."""
        return self._inputs[name].looked_up(ids)

    def source(self, name: str, index: int, ids: Tensor | None = None) -> Tensor:
        """One source's alone, by its place in `Inputs.sources`."""
        return rows_of(self._inputs[name].sources[index], ids)


class OnDisk:
    """Nothing is kept but the tensors of the block that was asked for last."""

    def __init__(self, device: torch.device, read: Read):
        self._device, self._read = device, read
        self._groups: dict[str, tuple[str, ...]] = {}
        self._present: Mapping[str, Inputs] = {}

    def put(self, name: str, inputs: Callable[[], Inputs]) -> None:
        self._groups[name] = (name,)

    def group(self, groups: Iterable[Collection[str]]) -> None:
        for names in map(tuple, groups):
            self._groups |= dict.fromkeys(names, names)

    def _gathered(self, name: str) -> Inputs:
        if name not in self._present:
            self._present = {}  # before the next are read
            self._present = self._read(self._groups[name])
        return self._present[name]

    def get(self, name: str, ids: Tensor | None = None) -> Inputs:
        wanted = self._gathered(name).looked_up(_on_cpu(ids))
        return wanted.each(lambda tensor: tensor.to(self._device))

    def source(self, name: str, index: int, ids: Tensor | None = None) -> Tensor:
        whole = self._gathered(name).sources[index]
        return rows_of(whole, _on_cpu(ids)).to(self._device)


def _on_cpu(ids: Tensor | None) -> Tensor | None:
    """Where tensors of files are."""
    return None if ids is None else ids.cpu()


Wanted = tuple[tuple[str, ...], int | None]  # a block's tensors; of one source, or of all


class Arena:
    """Copies of tensors in pinned memory, one after the other in large pieces: torch rounds each
    piece up to a power of two, which for single weights would waste a quarter to a half."""

    def __init__(self, size: int = 2**30, *, pinned: bool = True):
        self._size, self._pinned = size, pinned
        self._rests: list[Tensor] = []  # of all pieces

    def copy(self, tensor: Tensor) -> Tensor:
        taken = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        fits = (n for n, rest in enumerate(self._rests) if len(rest) >= taken)
        if (number := next(fits, None)) is None:
            number = len(self._rests)
            self._rests.append(self._piece(taken))
        rest = self._rests[number]
        place, self._rests[number] = rest[: tensor.nbytes], rest[taken:]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def _piece(self, taken: int) -> Tensor:
        size = max(self._size, 1 << (taken - 1).bit_length())  # as torch would, to use the rest
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError as error:
            raise DamError(
                f"Host memory for the sources could not be pinned ({str(error).splitlines()[0]}): "
                "set `dam.offload: disk`."
            ) from error


class InHostMemory:
    """All in pinned memory; a block's and the next block's on the device.

    Which block comes next is what came next the last time after the same two blocks: steps repeat
    themselves, forwards for the merge and each teacher and backwards.
    """

    def __init__(self, device: torch.device, read: Read):
        self._device, self._inputs = device, {}
        self._groups: dict[str, tuple[str, ...]] = {}
        self._is_cuda, self._arena = device.type == "cuda", Arena()
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None
        self._last: tuple[Wanted | None, Wanted | None] = (None, None)
        self._followed: dict[tuple[Wanted | None, Wanted | None], Wanted] = {}
        self._copies: dict[Wanted, _Copy] = {}
        self._passed: torch.cuda.Event | None = None  # where the GPU is done with a block

    def put(self, name: str, inputs: Callable[[], Inputs]) -> None:
        keep = self._arena.copy if self._is_cuda else (lambda tensor: tensor)
        self._inputs[name], self._groups[name] = inputs().each(keep), (name,)

    def group(self, groups: Iterable[Collection[str]]) -> None:
        for names in map(tuple, groups):
            self._groups |= dict.fromkeys(names, names)

    def get(self, name: str, ids: Tensor | None = None) -> Inputs:
        return self._on_device((self._groups[name], None))[name].looked_up(ids)

    def source(self, name: str, index: int, ids: Tensor | None = None) -> Tensor:
        """Of a copy of all sources, where one is there."""
        whole = (self._groups[name], None)
        if whole in self._copies:
            return rows_of(self._on_device(whole)[name].sources[index], ids)
        return rows_of(self._on_device((self._groups[name], index))[name].sources[0], ids)

    def _on_device(self, wanted: Wanted) -> Mapping[str, Inputs]:
        if wanted != self._last[1]:
            self._followed[self._last] = wanted
            self._last = (self._last[1], wanted)
            together = [key for key in (wanted, self._followed.get(self._last)) if key]
            self._keep_pace()
            # Those before go first; what is wanted now is copied first.
            self._copies = {key: self._copies[key] for key in together if key in self._copies}
            self._copies |= {key: self._copy(key) for key in together if key not in self._copies}
        return self._copies[wanted].wait()

    def _keep_pace(self) -> None:
        """Wait until the GPU has come to the block before this one: what runs ahead of it would
        copy block after block into memory of which none is free yet."""
        if self._is_cuda:
            before, self._passed = (
                self._passed,
                torch.cuda.current_stream(self._device).record_event(),
            )
            if before is not None:
                before.synchronize()

    def _copy(self, wanted: Wanted) -> "_Copy":
        names, index = wanted
        chosen = {name: self._inputs[name] for name in names}
        if index is not None:
            chosen = {
                name: Inputs(own.sources[index : index + 1], None, None)
                for name, own in chosen.items()
                if index < len(own.sources)
            }
        return _Copy(chosen, self._device, self._stream)


class _Copy:
    """Tensors on their way to a GPU, on a stream of their own."""

    def __init__(self, chosen: Mapping[str, Inputs], device: torch.device, stream):
        self._arrived, self._device = None, device
        with torch.cuda.stream(stream):  # without a GPU this does nothing
            self._inputs = {
                name: own.each(lambda tensor: tensor.to(device, non_blocking=True))
                for name, own in chosen.items()
            }
            if stream is not None:
                self._arrived = stream.record_event()

    def wait(self) -> Mapping[str, Inputs]:
        """For the tensors, on the stream that computes with them."""
        if self._arrived is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(self._arrived)
            for own in self._inputs.values():
                own.each(lambda tensor: tensor.record_stream(computing) or tensor)
            self._arrived = None
        return self._inputs


Store = Held | OnDisk | InHostMemory
STORES: Mapping[Offload, type[Store]] = {"none": Held, "cpu": InHostMemory, "disk": OnDisk}
