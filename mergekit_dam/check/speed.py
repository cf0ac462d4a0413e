"""How long a step of the fit will take here: its parts, timed on matrices of the model's width."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from mergekit_dam.fit.memory import Needs
from mergekit_dam.formula import combine

PASSES = 5  # forward: the sources, the merge, the merge again; backward: to activations, to weights
TOKENS = 512  # of the timed product
REPEAT, TOGETHER = 5, 4


def step_seconds(needs: Needs, width: int, sources: int, dtype: torch.dtype, device: str) -> float:
    """Computing alone, with whole blocks made again; without attention's own products, the
    vocabulary's losses and copies from host memory. Of experts all are counted."""
    x, matrix = (torch.rand(rows, width).to(device, dtype) for rows in (TOKENS, width))
    weights = [matrix.clone() for _ in range(sources)]
    c = torch.full((sources, 1, width), 1 / sources, device=device, requires_grad=True)
    product = _seconds(lambda: x @ matrix) / (TOKENS * width**2)
    made = combine(c, weights)
    making = _seconds(lambda: combine(c.detach(), weights)) / width**2
    reducing = _seconds(lambda: torch.autograd.grad(made, c, matrix, retain_graph=True)[0])
    of_weights = 2 * making + reducing / width**2
    return needs.parameters * (PASSES * needs.tokens * product + of_weights)


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
