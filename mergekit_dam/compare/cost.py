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
        self._share, self._rows, self._backward, self._tokens = 1 / max(layers, 1), 0, 0, 0

    def see(self, module: nn.Module, inputs: tuple) -> None:
        """Every call of a decoder layer is a part of a pass, whoever makes it: a fit, its start, a
        teacher. Layers that the backward pass computes again are no further passes, nor are trials
        with fake tensors, which compute nothing."""
        if not isinstance(module, GradientCheckpointingLayer) or _is_in_backward():
            return
        if inputs and type(inputs[0]) is Tensor:
            rows, length, _ = inputs[0].shape
            self._rows += rows
            self._tokens += rows * length
            self._backward += rows * torch.is_grad_enabled()

    def stop(self, seconds: float, peak_memory: int) -> None:
        self.cost = Cost(
            seconds=seconds,
            forward_passes=round(self._rows * self._share),
            backward_passes=round(self._backward * self._share),
            tokens=round(self._tokens * self._share),
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
