"""AdamW with steps along what the sources differ in, as large as suits how far they differ."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.config.settings import Basis
from mergekit_dam.model import MergedModel, Stack

STEP = 0.05  # relative to what the sources of a tensor differ in
SMALLEST = 1e-5  # where they are all the same
TINY = 1e-30  # instead of a division by zero


class DifferencesAdamW(torch.optim.AdamW):
    """AdamW on u and b of W = (1 + b) * M + Σ u_i * (W_i - M), for parameters that hold the c of
    W = Σ c_i * W_i. M = Σ m_i * W_i is the base, where it is a source, or the sources' mean.

    A step in one c_i moves a weight along W_i, nearly all of which the sources share; one in u_i
    moves it along what source i has learnt, however little that is.

    A parameter group with `middle` has two tensors: c [N, *B] and a b [*B] that is zero between
    the steps. `middle` are the m_i, `rows` the sources that have a u, `share` is b's step relative
    to u's. Other groups are plain AdamW's.
    """

    @torch.no_grad()
    def step(self, closure=None):
        before = [_turn(group) for group in self.param_groups]
        result = super().step(closure)
        for group, value in zip(self.param_groups, before, strict=True):
            if value is not None:
                _turn_back(group, value)
        return result


def _turn(group: dict[str, Any]) -> Tensor | None:
    """Put the gradient by u and b in the place of that by c; returns c as it is."""
    if "middle" not in group or group["params"][0].grad is None:
        return None
    c, b = group["params"]
    b.grad = (_middle(group) * c.grad).sum(0)
    by_u = torch.zeros_like(c.grad)
    by_u[group["rows"]] = c.grad[group["rows"]] - b.grad
    c.grad.copy_(by_u)
    return c.clone()


def _turn_back(group: dict[str, Any], before: Tensor) -> None:
    c, b = group["params"]
    step = c - before
    c.copy_(before + step + _middle(group) * (group["share"] * b - step.sum(0)))
    b.zero_()


def _middle(group: dict[str, Any]) -> Tensor:  # [N, 1, ...]
    c = group["params"][0]
    return c.new_tensor(group["middle"]).reshape(-1, *[1] * (c.ndim - 1))


def parameter_groups(merged: MergedModel, rate: float | None, basis: Basis) -> list[dict[str, Any]]:
    """Each trained tensor's coefficients, with a learning rate: `rate`, or one by which a step
    moves every merged weight by a like share of what its sources differ in, be they far apart or
    close to their base."""
    return [
        _group(coefficients, merged.stack(name), rate, basis)
        for name, coefficients in merged.trained_coefficients().items()
    ]


@torch.no_grad()
def _group(c: Tensor, stack: Stack, rate: float | None, basis: Basis) -> dict[str, Any]:
    parts, subtracted = stack.parts
    if basis == "differences" and subtracted is None and stack.prepared is None and len(parts) > 1:
        return {"weight_decay": 0.0, **_turned(c, stack, parts, rate)}
    mean = sum(part.float() for part in parts) / len(parts)
    relative = _size(parts, mean) / max(_size(parts, subtracted), TINY)
    return {"params": [c], "lr": rate or max(STEP * relative, SMALLEST), "weight_decay": 0.0}


def _turned(c: Tensor, stack: Stack, parts: Sequence[Tensor], rate: float | None) -> dict[str, Any]:
    """A group with `middle`: the base, which is the last of the parts, or their mean."""
    rows, own = list(stack.rows), stack.teachers
    shares = [0.0] * own + [1.0] if own < len(rows) else [1 / own] * own
    middle = sum(share * part.float() for share, part in zip(shares, parts, strict=True) if share)
    apart = _size(parts[:own], middle)
    of_rows = dict(zip(rows, shares, strict=True))
    return {
        "params": [c, torch.zeros_like(c[0]).requires_grad_()],
        "lr": rate or (STEP if apart else SMALLEST),
        "middle": [of_rows.get(row, 0.0) for row in range(len(c))],
        "rows": rows[:own],
        "share": min(apart / max(_size([middle]), TINY), 1.0),
    }


def _size(parts: Sequence[Tensor], middle: Tensor | None = None) -> float:
    """Root mean square of the parts' distances from a middle, by default zero."""
    squares = ((p.float() - (0 if middle is None else middle)).square().mean() for p in parts)
    return float(sum(squares) / len(parts)) ** 0.5
