"""Attention whose gradients have the same bits in every run.

On a GPU torch's fused kernels share a long row among processors, whose gradients are added as they
come, unless deterministic algorithms are asked for (torch's notes on randomness). Here they are
while such a kernel is differentiated, and for nothing else: not every operation of a model has one,
and what has none would end the fit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import deterministic

FUSED = "ScaledDotProduct"  # begins the names of the kernels' nodes in autograd's graph
STEPS = 3  # to such a node: where a head's width is padded, its result is cut again
DETERMINISTIC = 2  # the mode that torch calls "error"; its "warn" leaves kernels as they are


@contextmanager
def in_one_order() -> Iterator[None]:
    """A context in which attention is computed that will be differentiated so."""
    _as_before()  # after an error in a backward pass
    plain = F.scaled_dot_product_attention

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        result = plain(*args, **kwargs)
        _watch(result.grad_fn)
        return result

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


@contextmanager
def as_usual() -> Iterator[None]:
    """A context for what is computed on the way to a kernel's gradients, and is not them."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(_modes[0][0] if _modes else mode)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def _watch(node: Any) -> None:
    """Nothing where the result has no gradients, or is no fused kernel's."""
    for _ in range(STEPS):
        if node is None:
            return
        if node.name().startswith(FUSED):
            node.register_prehook(_be_deterministic)
            node.register_hook(_as_before)
            return
        node = next(iter(node.next_functions), (None,))[0]


_modes: list[tuple[int, bool]] = []  # as it was, while a kernel is differentiated


def _be_deterministic(_gradients: Any) -> None:
    _modes.append((torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory))
    torch.set_deterministic_debug_mode(DETERMINISTIC)
    deterministic.fill_uninitialized_memory = False  # kernels write all that they return


def _as_before(*_gradients: Any) -> None:
    while _modes:
        mode, deterministic.fill_uninitialized_memory = _modes.pop()
        torch.set_deterministic_debug_mode(mode)
