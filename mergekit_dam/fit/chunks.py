"""Losses over the vocabulary, some tokens at a time.

Logits [tokens, vocabulary] of a step would take more memory than the rest of it (8,192 tokens with
128,000 entries: 4 GB, several times over). Here they exist for one chunk of tokens, of one source
or of several. A chunk's gradients are computed at once with its loss, so that the head runs once,
and not again in the backward pass; and what the terms make of the logits on the way, for one piece
of a chunk.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.model import Head

CHUNK = 2**25  # logits that the head makes at once: 128 MB in float32
# Of these, so many go through the terms at once, for each kind of device; all where none is given.
PIECES = {"cpu": 2**18}  # 1 MB: what is made of them stays in the processor's cache

Terms = Mapping[str, Tensor]


@dataclass(frozen=True)
class Section:
    """Tokens of one source."""

    states: Sequence[Tensor]  # of the student, some [tokens, width]
    teach: Callable[[slice], Tensor]  # the teacher's logits [tokens, vocabulary] of some of them
    # The student's and the teacher's logits of some of them -> terms, each a share of the whole:
    # they are added up.
    compare: Callable[[Tensor, Tensor], Terms]


def slices(tokens: int, vocabulary: int, numbers: int | None = None) -> Iterator[slice]:
    """Chunks of tokens, about equal in length, of so many numbers at most."""
    most = max(1, (numbers or CHUNK) // vocabulary)
    count = -(-tokens // most)
    size = -(-tokens // max(1, count))
    for start in range(0, tokens, size or 1):
        yield slice(start, min(start + size, tokens))


def piece_of(device: torch.device) -> int:
    """How many numbers the terms work on at once."""
    return min(CHUNK, PIECES.get(device.type, CHUNK))


class ChunkedLoss:
    """The sum of sections' terms, with the gradients of the states and of the head."""

    def __init__(self, head: Head, vocabulary: int, weights: Mapping[str, float]):  # of the terms
        self._head, self._vocabulary, self._weights = head, vocabulary, weights
        self._trained = head.trained() if torch.is_grad_enabled() else []

    def __call__(self, sections: Sequence[Section]) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The loss, differentiable, and each section's terms, without gradients."""
        states = torch.cat([part for section in sections for part in section.states])
        wants = states.requires_grad and torch.is_grad_enabled()
        gradient = torch.empty_like(states) if wants else None
        zero, of_head = torch.zeros((), device=states.device), []
        totals = [dict.fromkeys(self._weights, zero) for _ in sections]
        for chunk in slices(len(states), self._vocabulary):
            part = states[chunk].detach().requires_grad_(wants)
            found = self._chunk(part, _within(sections, chunk), totals)
            if wants:
                gradient[chunk] = found.pop(0)
            of_head = _added(of_head, found)
            del found  # as large as the head, before the next chunk's comes
        loss = sum((self._weighted(own) for own in totals), zero)
        pairs = [(states, gradient)] if wants else []
        if of_head:
            pairs += zip((weight for weight, _ in self._trained), of_head, strict=True)
        return _Known.apply(loss, *(tensor for pair in pairs for tensor in pair)), totals

    def _chunk(
        self,
        states: Tensor,
        parts: Iterator[tuple[int, Section, slice, slice]],
        totals: list[dict[str, Tensor]],
    ) -> list[Tensor]:
        """Adds a chunk's terms; returns the gradients of the states and of the head's weights,
        those that are wanted."""
        logits = self._head(states)
        slope = torch.empty_like(logits) if logits.requires_grad else None
        for number, section, own, place in parts:
            part = None if slope is None else slope[place]
            self._section(section, own, logits[place].detach(), part, totals[number])
        if slope is None:
            return []
        inputs = [states] if states.requires_grad else []
        inputs += [leaf for _, leaf in self._trained]
        # A head may have weights that it does not use: a bias beside the one that is tied to it.
        return list(torch.autograd.grad(logits, inputs, slope, materialize_grads=True))

    def _section(
        self,
        section: Section,
        own: slice,  # which of its tokens
        logits: Tensor,
        slope: Tensor | None,  # is filled in
        totals: dict[str, Tensor],
    ) -> None:
        teacher = section.teach(own)
        for piece in slices(len(teacher), self._vocabulary, piece_of(logits.device)):
            student = logits[piece].detach().requires_grad_(slope is not None)
            terms = section.compare(student, teacher[piece])
            for name in self._weights:
                totals[name] = totals[name] + terms[name].detach()
            if slope is not None:
                (slope[piece],) = torch.autograd.grad(self._weighted(terms), student)

    def _weighted(self, terms: Terms) -> Tensor:
        return sum(weight * terms[name] for name, weight in self._weights.items())


def _added(totals: list[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of many chunks are added up, so in float32 at least."""
    if not totals:
        return [v.to(torch.promote_types(v.dtype, torch.float32)) for v in values]
    for total, value in zip(totals, values, strict=True):
        total += value
    return totals


def _within(
    sections: Sequence[Section], chunk: slice
) -> Iterator[tuple[int, Section, slice, slice]]:
    """The sections that have tokens in a chunk of all, by number: which of theirs, and where."""
    begin = 0
    for number, section in enumerate(sections):
        end = begin + sum(map(len, section.states))
        first, last = max(begin, chunk.start), min(end, chunk.stop)
        if first < last:
            own = slice(first - begin, last - begin)
            yield number, section, own, slice(first - chunk.start, last - chunk.start)
        begin = end


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    """In place. A GPU would round a factor without axes to the gradient's 16 bits."""
    if gradient.dtype == factor.dtype:
        return gradient.mul_(factor)
    return gradient.copy_(gradient * factor[None])


class _Known(torch.autograd.Function):
    """A value whose gradients are known: the value, then each tensor and its gradient in turn."""

    @staticmethod
    def forward(ctx, value, *pairs):
        ctx.gradients = pairs[1::2]
        return value.clone()

    @staticmethod
    def backward(ctx, outer):
        results = [part for g in ctx.gradients for part in (_times(g, outer), None)]
        ctx.gradients = None  # used once; their memory goes with them
        return None, *results
