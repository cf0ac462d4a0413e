"""Alternating measurements in one process: medians, ratios and peaks of memory."""

import ctypes
import gc
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Step = Callable[[], None]


class Peak:
    """The most memory that a step has beyond what was there before it (or `before`), in bytes.

    On CUDA the allocator's; on the CPU the process' own resident pages (`RssAnon`), so that the
    memory-mapped files of the sources do not count.
    """

    def __init__(self, device: str, before: int | None = None):
        self._device, self._is_cuda = device, device.startswith("cuda")
        self._given, self.most = before, 0

    def __enter__(self) -> "Peak":
        gc.collect()
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            ctypes.CDLL(None).malloc_trim(0)
        self._before = taken(self._device) if self._given is None else self._given
        if not self._is_cuda:
            self._ends = threading.Event()
            self._watch = threading.Thread(target=self._sample)
            self._watch.start()
        return self

    def _sample(self) -> None:
        while not self._ends.wait(0.002):
            self.most = max(self.most, taken(self._device) - self._before)

    def __exit__(self, *_) -> None:
        if self._is_cuda:
            self.most = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self._ends.set()
            self._watch.join()


def peak_of(step: Step, device: str, before: int | None = None) -> int:
    """The peak of a step after one to warm up."""
    step()
    with Peak(device, before) as peak:
        step()
    return peak.most


def taken(device: str) -> int:
    """Bytes that this process has there now."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def alternate(steps: Mapping[str, Step], repeat: int, device: str) -> dict[str, list[float]]:
    """Seconds of each step, one after the other, `repeat` times; once before to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repeat + 1):
        for name, step in steps.items():
            _synchronise(device)
            start = time.perf_counter()
            step()
            _synchronise(device)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def table(
    seconds: Mapping[str, list[float]],
    peaks: Mapping[str, int],
    first: str,
    predicted: Mapping[str, int] | None = None,  # peaks
) -> str:
    """A Markdown table; ratios are medians of the ratios within each round."""
    columns = ["", "seconds, median", "ratio to the first", "peak memory, MB"]
    columns += [] if predicted is None else ["predicted, MB"]
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, seconds[first], strict=True))
        line = [name, f"{statistics.median(own):.3g}", f"{ratio:.2f}", _megabytes(peaks[name])]
        lines.append(line if predicted is None else [*line, _megabytes(predicted.get(name))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.0f}"


def machine(device: str) -> str:
    kind = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor()
    if not device.startswith("cuda"):
        names = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("model name\t: ")[2]
        kind = f"{names.partition(chr(10))[0] or kind}, {torch.get_num_threads()} threads"
    return f"{kind}, torch {torch.__version__}"
