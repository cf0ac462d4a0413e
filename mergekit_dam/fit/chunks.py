"""Losses over the vocabulary, some tokens at a time.

Logits [tokens, vocabulary] of a step would take more memory than the rest of it (8,192 tokens with
128,000 entries: 4 GB, several times over). Here they exist for one chunk of tokens. A chunk's
gradients are computed at once with its loss, so that the head runs once, and not again in the
backward pass.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from mergekit_dam.model import Head

CHUNK = 2**25  # logits that exist at once: 128 MB in float32

# Logits [tokens, vocabulary] of a chunk, and which it is -> the terms of the loss, each a share of
# the whole: they are added up.
Terms = Callable[[Tensor, slice], Mapping[str, Tensor]]


def slices(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Chunks of tokens, about equal in length."""
    count = max(1, -(-tokens * vocabulary // CHUNK))
    size = -(-tokens // count)
    for start in range(0, tokens, size or 1):
        yield slice(start, min(start + size, tokens))


class ChunkedLoss:
    """Adds up losses of the logits that one head makes, with the gradients of states and head."""

    def __init__(self, head: Head, vocabulary: int):
        self._head, self._vocabulary = head, vocabulary
        self._total = torch.zeros(())
        trained = head.trained() if torch.is_grad_enabled() else []
        self._leaves = [leaf for _, leaf in trained]
        # Tensors and their gradients; many chunks are added up, so in float32 at least.
        self._of_head = [
            (weight, torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32)))
            for weight, leaf in trained
        ]
        self._of_states: list[tuple[Tensor, Tensor]] = []

    def add(
        self,
        states: Tensor,  # [tokens, width]
        terms: Terms,
        weights: Mapping[str, float],  # of the terms
    ) -> dict[str, Tensor]:
        """Adds the terms times their weights; returns the terms, without gradients."""
        wants = states.requires_grad and torch.is_grad_enabled()
        gradient = torch.zeros_like(states) if wants else None
        totals = dict.fromkeys(weights, torch.zeros((), device=states.device))
        for chunk in slices(len(states), self._vocabulary):
            part = states[chunk].detach().requires_grad_(wants)
            found = terms(self._head(part), chunk)
            totals = {name: total + found[name].detach() for name, total in totals.items()}
            if wants or self._leaves:
                loss = sum(weight * found[name] for name, weight in weights.items())
                self._differentiate(loss, part, gradient[chunk] if wants else None)
        if wants:
            self._of_states.append((states, gradient))
        self._total = self._total.to(states.device)
        self._total += sum(weight * totals[name] for name, weight in weights.items())
        return totals

    def _differentiate(self, loss: Tensor, part: Tensor, gradient: Tensor | None) -> None:
        inputs = self._leaves if gradient is None else [part, *self._leaves]
        found = list(torch.autograd.grad(loss, inputs))
        if gradient is not None:
            gradient.copy_(found.pop(0))
        for (_, total), value in zip(self._of_head, found, strict=True):
            total += value

    def loss(self) -> Tensor:
        """The sum of all that was added; differentiable."""
        pairs = [*self._of_states, *self._of_head]
        return _Known.apply(self._total, *(tensor for pair in pairs for tensor in pair))


class _Known(torch.autograd.Function):
    """A value whose gradients are known: the value, then each tensor and its gradient in turn."""

    @staticmethod
    def forward(ctx, value, *pairs):
        ctx.gradients = pairs[1::2]
        return value.clone()

    @staticmethod
    def backward(ctx, outer):
        results = [part for g in ctx.gradients for part in (g.mul_(outer.to(g.dtype)), None)]
        ctx.gradients = None  # used once; their memory goes with them
        return None, *results
