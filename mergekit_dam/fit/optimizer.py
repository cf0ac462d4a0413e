"""AdamW with steps along what the sources differ in, as large as suits how far they differ."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.config.settings import Basis
from mergekit_dam.formula import in_pieces
from mergekit_dam.model import MergedModel, Stack

STEP = 0.05  # relative to what the sources of a tensor differ in
SMALLEST = 1e-5  # where they are all the same
TINY = 1e-30  # instead of a division by zero


class DifferencesAdamW(torch.optim.AdamW):
    """AdamW on u and b of W = (1 + b) * M + Σ u_i * (W_i - M), for parameters that hold the c of
    W = Σ c_i * W_i. M = Σ m_i * W_i is the base, where it is a source, or the sources' mean.

    A step in one c_i moves a weight along W_i, nearly all of which the sources share; one in u_i
    moves it along what source i has learnt, however little that is.

    A group that is given with `middle` has two tensors: c [N, *B] and a b [*B] that is zero between
    the steps. `middle` are the m_i, `rows` the sources that have a u, `share` is b's step relative
    to u's. Other groups are plain AdamW's.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **options: Any):
        super().__init__(_joined(groups), **options)
        self._turns = [_Turn(group) if "middle" in group else None for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        turns = [turn for turn in self._turns if turn is not None]
        for turn in turns:
            turn.begin()
        result = super().step(closure)
        for turn in turns:
            turn.end()
        return result


def memory(numbers: int, sources: int, *, along_differences: bool) -> tuple[int, int]:
    """Bytes of so many coefficients of so many sources with their moments, and what a step takes
    beside them: gradients, and for `_Turn` copies of all."""
    of_b = 1 / sources if along_differences else 0.0  # a tensor like the c of one source
    update = 16 * (1 + of_b) if along_differences else 4
    return int(12 * (1 + of_b) * numbers), int(update * numbers)


def _joined(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of one learning rate as one, with a list of each key for its tensors: a step is
    a few operations then, however many tensors there are."""
    joined: dict[tuple, dict[str, Any]] = {}
    for group in groups:
        own = {key: [group[key]] for key in ("middle", "rows", "share") if key in group}
        key = group["lr"], bool(own)
        if key not in joined:
            joined[key] = {**group, "params": list(group["params"]), **own}
            continue
        for name, values in (("params", group["params"]), *own.items()):
            joined[key][name] += values
    return list(joined.values())


class _Turn:
    """The change from c to u and b for a step, of all tensors of a group side by side: [N, K]."""

    def __init__(self, group: dict[str, Any]):
        self._cs, self._bs = group["params"][::2], group["params"][1::2]
        self._sizes = [b.numel() for b in self._bs]
        rows = [[float(row in own) for row in range(len(self._cs[0]))] for own in group["rows"]]
        self._middle, self._own, self._share = (
            self._cs[0].new_tensor(values).T  # [N or 1, tensors]
            for values in (group["middle"], rows, [[share] for share in group["share"]])
        )
        self._before: Tensor | None = None

    def _spread(self, values: Tensor) -> Tensor:  # [n, tensors] -> [n, K]
        sizes = torch.tensor(self._sizes, device=values.device)
        return values.repeat_interleave(sizes, 1, output_size=sum(self._sizes))

    def begin(self) -> None:
        """Put the gradient by u and b in the place of that by c; none counts as zero."""
        self._before = _flat(self._cs)
        by_c = _flat([torch.zeros_like(c) if c.grad is None else c.grad for c in self._cs])
        by_b = (self._spread(self._middle) * by_c).sum(0)
        by_u = by_c.sub_(by_b).mul_(self._spread(self._own))
        for c, part in zip(self._cs, by_u.split(self._sizes, 1), strict=True):
            c.grad = part.reshape(c.shape).contiguous()  # fused kernels look at no strides
        for b, part in zip(self._bs, by_b.split(self._sizes), strict=True):
            b.grad = part.reshape(b.shape)

    def end(self) -> None:
        """Take the step that u and b have made in c."""
        after = _flat(self._cs)
        by_b = self._spread(self._share)[0] * torch.cat([b.flatten() for b in self._bs])
        by_b -= (after - self._before).sum(0)
        after += self._spread(self._middle).mul_(by_b)
        for c, part in zip(self._cs, after.split(self._sizes, 1), strict=True):
            c.copy_(part.reshape(c.shape))
        torch._foreach_zero_(self._bs)
        self._before = None


def _flat(values: Sequence[Tensor]) -> Tensor:  # each [N, *B] -> [N, K]
    return torch.cat([value.flatten(1) for value in values], 1)


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
    inputs = stack.load()
    parts, subtracted = inputs.parts
    is_linear = inputs.base is None and inputs.prepared is None  # in the weights themselves
    if basis == "differences" and is_linear and len(parts) > 1:
        return {"weight_decay": 0.0, **_turned(c, stack, parts, rate)}
    apart, _ = _sizes(parts, parts, [1 / len(parts)] * len(parts))
    base = [] if subtracted is None else [subtracted]
    moved, _ = _sizes(parts, base, [1.0] * len(base))
    relative = apart / max(moved, TINY)
    return {"params": [c], "lr": rate or max(STEP * relative, SMALLEST), "weight_decay": 0.0}


def _turned(c: Tensor, stack: Stack, parts: Sequence[Tensor], rate: float | None) -> dict[str, Any]:
    """A group with `middle`: the base, which is the last of the parts, or their mean."""
    rows, own = list(stack.rows), stack.teachers
    shares = [0.0] * own + [1.0] if own < len(rows) else [1 / own] * own
    apart, middle = _sizes(parts[:own], parts, shares)
    of_rows = dict(zip(rows, shares, strict=True))
    return {
        "params": [c, torch.zeros_like(c[0]).requires_grad_()],
        "lr": rate or (STEP if apart else SMALLEST),
        "middle": [of_rows.get(row, 0.0) for row in range(len(c))],
        "rows": rows[:own],
        "share": min(apart / max(middle, TINY), 1.0),
    }


def _sizes(
    parts: Sequence[Tensor], others: Sequence[Tensor], shares: Sequence[float]
) -> tuple[float, float]:
    """Root mean squares: of the parts' distances from Σ share × other, and of that sum."""
    distances, middles = 0.0, 0.0
    # Whole tensors in float32 would take more than a step.
    for some in in_pieces(*parts, *others):
        middle = torch.zeros((), device=parts[0].device)
        for share, other in zip(shares, some[len(parts) :], strict=True):
            if share:
                middle = middle + share * other.float()
        apart = ((part.float() - middle).square().sum().item() for part in some[: len(parts)])
        distances, middles = distances + sum(apart), middles + middle.square().sum().item()
    count = parts[0].numel()
    return (distances / len(parts) / count) ** 0.5, (middles / count) ** 0.5
