"""Counts what a piece of work costs: time, passes through models, tokens, memory."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.modeling_layers import GradientCheckpointingLayer

from mergekit_dam.compare.records import Cost

INTERVAL = 0.02  # seconds between looks at the process's memory


class Meter:
    """Its `cost` is known when the work is over."""

    def __init__(self, layers: int):  # of the merge: so many make a pass
        self.cost = Cost()
        self._layers = max(layers, 1)
        self._parts: dict[nn.Module, float] = {}  # of decoder layers: their shares of the layer
        self._given = 0  # rows of the layer that is running
        self._rows = self._backward = self._tokens = 0.0

    def see(self, module: nn.Module, inputs: tuple) -> None:
        """Every call of a part of a decoder layer is a part of a pass, by its number of weights,
        whoever makes it: a fit, a teacher, a start that runs layers in parts. Tokens count where
        they enter a model. What the backward pass computes again does not count, nor do trials
        with fake tensors."""
        if _is_in_backward() or not inputs or type(inputs[0]) is not Tensor:
            return
        if isinstance(module, nn.Embedding) and _is_text(inputs[0]):
            self._tokens += inputs[0].numel()
        elif isinstance(module, GradientCheckpointingLayer):
            self._given = len(inputs[0])
            if module not in self._parts:
                self._parts |= {module: 0.0, **_shares(module)}
        elif share := self._parts.get(module):
            rows = self._given * share / self._layers
            self._rows += rows
            self._backward += rows * torch.is_grad_enabled()

    def stop(self, seconds: float, peak_memory: int) -> None:
        self.cost = Cost(
            seconds=seconds,
            forward_passes=round(self._rows),
            backward_passes=round(self._backward),
            tokens=round(self._tokens),
            peak_memory=peak_memory,
        )


@contextmanager
def metered(layers: int, device: str) -> Iterator[Meter]:
    meter, watch = Meter(layers), _GpuMemory(device) if "cuda" in device else _HostMemory()
    hook = register_module_forward_pre_hook(meter.see)
    started = time.perf_counter()
    try:
        yield meter
    finally:
        seconds = time.perf_counter() - started
        hook.remove()
        meter.stop(seconds, watch.stop())


def _is_text(ids: Tensor) -> bool:
    """Rows of token ids, and not the one row of positions that some models look up, too."""
    return ids.ndim == 2 and not (len(ids) == 1 and torch.equal(ids[0], _positions(ids)))


def _positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device)


def _shares(layer: nn.Module) -> dict[nn.Module, float]:
    """The modules of a layer that own weights, and how much of its weights."""
    own = {m: sum(p.numel() for p in m.parameters(recurse=False)) for m in layer.modules()}
    total = sum(own.values())
    return {module: size / total for module, size in own.items() if size}


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class _GpuMemory:
    """The allocator's own peak."""

    def __init__(self, device: str):
        self._device = device
        torch.cuda.reset_peak_memory_stats(device)

    def stop(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)


class _HostMemory:
    """The process's resident memory, looked at from a thread: systems keep one peak for the whole
    life of a process, which says nothing about a part of it."""

    def __init__(self) -> None:
        self._process, self._done = psutil.Process(), threading.Event()
        self._peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(INTERVAL):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self._peak, self._process.memory_info().rss)
