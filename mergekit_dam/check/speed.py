"""How long a fit will take here: its parts, timed on matrices of the model's width."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.formula import combine

PASSES = 5  # forward: the sources, the merge, the merge again; backward: to activations, to weights
TOKENS = 512  # of the timed product
REPEAT, TOGETHER = 5, 4


@dataclass(frozen=True)
class Speed:
    """Seconds of computing alone, with whole blocks made again; without attention's own products,
    the vocabulary's losses and copies from host memory. Of experts all are counted."""

    of_token: float
    of_pass: float  # however many tokens go through

    def seconds(self, passes: int, tokens: int) -> float:
        return passes * self.of_pass + tokens * self.of_token


def measure_speed(
    parameters: int, width: int, sources: int, dtype: torch.dtype, device: str
) -> Speed:
    """Of a model with so many parameters in its matrices, which are about `width` wide."""
    x, matrix = (torch.rand(rows, width).to(device, dtype) for rows in (TOKENS, width))
    weights = [matrix.clone() for _ in range(sources)]
    c = torch.full((sources, 1, width), 1 / sources, device=device, requires_grad=True)
    product = _seconds(lambda: x @ matrix) / TOKENS
    made = combine(c, weights)
    making = _seconds(lambda: combine(c.detach(), weights))
    reducing = _seconds(lambda: torch.autograd.grad(made, c, matrix, retain_graph=True)[0])
    matrices = parameters / width**2
    return Speed(matrices * PASSES * product, matrices * (2 * making + reducing))


def duration(seconds: float) -> str:
    for unit, length in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds / length < 99.5:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds / 3600:.0f} h"


def _seconds(operation: Callable[[], Tensor]) -> float:
    """The least of some trials: what else the machine does takes no part."""
    operation().sum().item()
    times = []
    for _ in range(REPEAT):
        start = time.perf_counter()
        for _ in range(TOGETHER - 1):  # of which a GPU waits for none
            operation()
        operation().sum().item()
        times.append((time.perf_counter() - start) / TOGETHER)
    return min(times)
