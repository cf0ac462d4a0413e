"""How long a fit will take here: its parts, timed on matrices of the model's width."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_dam.fit.place import Place
from mergekit_dam.formula import combine
from mergekit_dam.model import Recompute
from mergekit_dam.products import fast_products

# Through all matrices. Forwards: the sources, the merge, with blocks that are made again the merge
# once more; backwards: to activations and to weights.
PASSES: dict[Recompute, int] = {"block": 5, "weights": 4, "none": 4}
MAKINGS: dict[Recompute, int] = {"block": 2, "weights": 2, "none": 1}  # of merged weights
TOKENS = 512  # of the timed product
COPIED = 2**26  # bytes of the timed copy
REPEAT, TOGETHER = 5, 4


@dataclass(frozen=True)
class Speed:
    """Seconds, without those of attention's own products and the vocabulary's losses. Of experts
    all are counted."""

    of_token: float
    of_pass: float  # however many tokens go through
    copies: float = 0.0  # of the sources to a GPU, in a pass
    go_on: bool = False  # while the GPU computes

    def seconds(self, passes: int, tokens: int) -> float:
        computing, copying = passes * self.of_pass + tokens * self.of_token, passes * self.copies
        return max(computing, copying) if self.go_on else computing + copying


def measure_speed(
    parameters: int,
    width: int,
    sources: int,
    dtype: torch.dtype,
    place: Place,
    *,
    held: int,
    is_live: bool,
) -> Speed:
    """Of a model with so many parameters in its matrices, which are about `width` wide, whose
    sources have `held` bytes; with `is_live` the sources compute in each step."""
    device, mode = place.device, place.recompute
    x, matrix = (torch.rand(rows, width).to(device, dtype) for rows in (TOKENS, width))
    weights = [matrix.clone() for _ in range(sources)]
    c = torch.full((sources, 1, width), 1 / sources, device=device, requires_grad=True)
    with fast_products(x.device):
        product = _seconds(lambda: F.linear(x, matrix)) / TOKENS
    made = combine(c, weights)
    making = _seconds(lambda: combine(c.detach(), weights))
    reducing = _seconds(lambda: torch.autograd.grad(made, c, matrix, retain_graph=True)[0])
    matrices, passes = parameters / width**2, PASSES[mode] - (not is_live)
    # A block's copies from host memory stay while it is computed with; those from files are made
    # each time: for its weights, their gradients and the teachers.
    copies = 2 if place.offload == "cpu" else MAKINGS[mode] + 1 + is_live
    return Speed(
        of_token=matrices * passes * product,
        of_pass=matrices * (MAKINGS[mode] * making + reducing),
        copies=held * copies * _of_a_byte(place),
        go_on=place.offload == "cpu",
    )


def _of_a_byte(place: Place) -> float:
    """Seconds that its copy to a GPU takes; from a file as if the system had it in memory."""
    if place.offload == "none" or torch.device(place.device).type == "cpu":
        return 0.0
    there = torch.ones(COPIED, dtype=torch.uint8, pin_memory=place.offload == "cpu")
    return _seconds(lambda: there.to(place.device, non_blocking=True)) / COPIED


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
