"""Held-out figures: how far the merge is from each source, and how well it predicts the text."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_dam import losses
from mergekit_dam.coefficients import Figures
from mergekit_dam.data import Row, together
from mergekit_dam.fit.batches import batch
from mergekit_dam.fit.chunks import piece_of, slices
from mergekit_dam.fit.objective import among, row_states
from mergekit_dam.model import Head, MergedModel


@torch.no_grad()
def evaluate(
    merged: MergedModel,
    held_out: Sequence[Sequence[Row]],
    tokens: int,  # that go through the model at once, and so many of these through the head:
    at_head: int,  # those of a step take no more memory than a step,
    known_tokens: Sequence[Tensor | None] | None = None,
    *,
    rows: int | None = None,  # if they are no more rows than a step's
) -> tuple[Figures, ...]:
    """One entry for each source; `known_tokens` are those of `Plan`."""
    known = known_tokens or [None] * len(held_out)
    return tuple(
        _figures(merged, source, list(together(own, tokens, rows)), at_head, known[source])
        for source, own in enumerate(held_out)
    )


def _figures(
    merged: MergedModel,
    source: int,
    batches: Sequence[Sequence[Row]],
    at_head: int,
    known: Tensor | None,
) -> Figures:
    tokens, totals = 0, torch.zeros(4, dtype=torch.float64)
    heads = merged.head(), merged.head(source)
    for some in batches:
        inputs = {k: v.to(merged.device) for k, v in batch(some, [source] * len(some)).items()}
        views = [(view, range(len(some))) for view in (None, source)]
        ids, ends, starts = (inputs[key] for key in ("input_ids", "lengths", "starts"))
        states = row_states(merged, ids, ends, starts, views)
        pieces = (torch.cat(own).split(at_head) for own in (*states, next_tokens(inputs)))
        for parts in zip(*pieces, strict=True):
            count, found = sums(heads, *parts, known, merged.vocabulary)
            tokens, totals = tokens + count, totals + found
    tokens = max(tokens, 1)  # none where the source lacks every target
    kl, merge_nll, source_nll, _ = (totals / tokens).tolist()
    return Figures(
        tokens=tokens,
        kl=kl,
        perplexity=perplexity(merge_nll),
        source_perplexity=perplexity(source_nll),
    )


def next_tokens(inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """For each row what comes after the positions that count: see `row_states`."""
    ids, ends, starts = (inputs[key] for key in ("input_ids", "lengths", "starts"))
    return [
        row[start + 1 : end]
        for row, start, end in zip(ids, starts.tolist(), ends.tolist(), strict=True)
    ]


def sums(
    heads: Sequence[Head],  # of the student, such as the merge, and of the teacher
    student: Tensor,  # states [tokens, width]
    teacher: Tensor,
    targets: Tensor,  # [tokens]
    known: Tensor | None,  # to the teacher; see `Plan.known_tokens`
    vocabulary: int,
) -> tuple[int, Tensor]:
    """How many tokens count, and sums over them [4]: of the KL, of the text's surprise for the
    student and for the teacher, and of those whose likeliest next token is the teacher's."""
    if known is not None:  # a target that the source lacks says nothing about it
        known = known.to(targets.device)
        mask = torch.isin(targets, known)
        targets = torch.searchsorted(known, targets[mask])
        student, teacher = student[mask], teacher[mask]
    found = torch.zeros(4, dtype=torch.float64)
    for chunk in slices(len(targets), vocabulary):
        logits = [head(part[chunk]) for head, part in zip(heads, (student, teacher), strict=True)]
        for piece in slices(len(logits[0]), vocabulary, piece_of(student.device)):
            some = among([part[piece] for part in logits], known)
            found += _sums(*some, targets[chunk][piece]).cpu()
    return len(targets), found


def _sums(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:  # of logits
    return torch.stack(
        [
            losses.kl(student, teacher) * len(student),
            F.cross_entropy(student.float(), targets, reduction="sum"),
            F.cross_entropy(teacher.float(), targets, reduction="sum"),
            (student.argmax(-1) == teacher.argmax(-1)).sum(),
        ]
    )


def perplexity(nll: float) -> float:
    """Of a mean negative log-likelihood."""
    return math.exp(min(nll, 700.0))  # beyond that a float overflows
