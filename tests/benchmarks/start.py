"""The least-squares start: what its products need, how long it takes, and its memory.

    python -m tests.benchmarks.start [--shape small|cpu|7b] [--sources 3] [--rows 4] [--repeat 1]

Random models are made and saved in a temporary folder, or in `--folder`, where the next run finds
them. The floor is the matrix products alone, at
the speed of one large product on the same device.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import click
import torch
from torch.utils.flop_counter import FlopCounterMode

from mergekit_dam.fit.prepare import Fit
from mergekit_dam.least_squares import least_squares, walk
from tests.benchmarks.fit_step import SHAPES, chosen, made, prepared, told
from tests.benchmarks.measuring import Peak, alternate

SOLVING, REST = "solving", "passes through the blocks and sums over the tokens"


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="small")
@click.option("--sources", default=3)
@click.option("--base", is_flag=True, help="a base as one more source, which teaches nothing")
@click.option("--rows", default=32, help="of each source")
@click.option("--length", default=256, help="tokens of a row")
@click.option("--repeat", default=3)
@click.option("--device", default=None)
@click.option("--offload", default="none")
@click.option("--cap", type=float, help="GB of the GPU that may be used")
@click.option("--layers", type=int, help="instead of the shape's own number")
@click.option("--folder", type=Path, help="where the models are kept")
def main(shape, sources, base, rows, length, repeat, device, offload, cap, layers, folder) -> None:
    device = chosen(device, cap)
    config, dtype = told(shape, layers, sources, base, rows, length, device)
    with tempfile.TemporaryDirectory() as temporary:
        models, origin, ids = made(
            folder or Path(temporary), config, dtype, sources, base, rows, length, device
        )
        runs = []
        for _ in range(repeat):
            fit = prepared(Path(temporary), models, origin, ids, dtype, device, offload)
            runs.append(_measured(fit, device))
        print(_table(runs, _seconds_of_a_flop(device, dtype), _seconds_of_a_flop(device)))
        print(f"\nforeseen: {fit.place.start / 1e6:.0f} MB")


@dataclass
class Run:
    seconds: dict[str, float] = field(default_factory=lambda: {REST: 0.0, SOLVING: 0.0})
    flops: dict[str, float] = field(default_factory=lambda: {REST: 0.0, SOLVING: 0.0})
    peak: int = 0  # bytes


def _measured(fit: Fit, device: str) -> Run:
    run, rows = Run(), [source.train for source in fit.data]
    real, counter = walk.solve, FlopCounterMode(display=False)

    def solve(*args, **kwargs):
        begin, before = _now(device), counter.get_total_flops()
        found = real(*args, **kwargs)
        run.seconds[SOLVING] += _now(device) - begin
        run.flops[SOLVING] += counter.get_total_flops() - before
        return found

    with Peak(device) as peak, counter, patch.object(walk, "solve", solve):
        begin = _now(device)
        least_squares(fit.merged, rows)
        run.seconds[REST] = _now(device) - begin - run.seconds[SOLVING]
    run.flops[REST] = counter.get_total_flops() - run.flops[SOLVING]
    run.peak = peak.most
    return run


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def _seconds_of_a_flop(device: str, dtype: torch.dtype = torch.float32) -> float:
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.rand(size, size).to(device, dtype) for _ in range(2))
    seconds = alternate({"product": lambda: torch.mm(a, b)}, 5, device)["product"]
    return min(seconds) / (2 * size**3)


def _table(runs: list[Run], passing: float, solving: float) -> str:
    lines = ["| | seconds, median | TFLOP | floor, seconds |", "|---|---:|---:|---:|"]
    for part, each in ((REST, passing), (SOLVING, solving)):
        seconds = statistics.median(run.seconds[part] for run in runs)
        flops = runs[0].flops[part]
        lines.append(f"| {part} | {seconds:.3g} | {flops / 1e12:.3g} | {flops * each:.3g} |")
    total = statistics.median(sum(run.seconds.values()) for run in runs)
    peak = max(run.peak for run in runs) / 1e6
    return "\n".join(lines) + f"\n\nin all {total:.3g} s; peak {peak:.0f} MB"


if __name__ == "__main__":
    main()
