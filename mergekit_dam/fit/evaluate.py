"""Held-out figures: how far the merge is from each source, and how well it predicts the text."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_dam import losses
from mergekit_dam.coefficients import Figures
from mergekit_dam.data import Row, together
from mergekit_dam.fit.batches import batch
from mergekit_dam.fit.chunks import slices
from mergekit_dam.fit.objective import among, row_states
from mergekit_dam.model import Head, MergedModel


@torch.no_grad()
def evaluate(
    merged: MergedModel,
    held_out: Sequence[Sequence[Row]],
    tokens: int,  # that go through the model at once, and so many of these through the head:
    at_head: int,  # those of a step take no more memory than a step
    known_tokens: Sequence[Tensor | None] | None = None,
) -> tuple[Figures, ...]:
    """One entry for each source; see `Plan.known_tokens` for the last argument."""
    known = known_tokens or [None] * len(held_out)
    return tuple(
        _figures(merged, source, rows, tokens, at_head, known[source])
        for source, rows in enumerate(held_out)
    )


def _figures(
    merged: MergedModel,
    source: int,
    rows: Sequence[Row],
    at_once: int,
    at_head: int,
    known: Tensor | None,
) -> Figures:
    # Sums over tokens: of the KL, and of the text's surprise for the merge and for the source.
    tokens, totals = 0, torch.zeros(3, dtype=torch.float64)
    known = None if known is None else known.to(merged.device)
    heads = merged.head(), merged.head(source)
    for some in together(rows, at_once):
        inputs = {k: v.to(merged.device) for k, v in batch(some, [source] * len(some)).items()}
        ids, ends, starts = (inputs[key] for key in ("input_ids", "lengths", "starts"))
        views = [(view, range(len(ids))) for view in (None, source)]
        states = row_states(merged, ids, ends, starts, views)
        targets = [
            row[start + 1 : end]
            for row, start, end in zip(ids, starts.tolist(), ends.tolist(), strict=True)
        ]
        pieces = (torch.cat(own).split(at_head) for own in (*states, targets))
        for parts in zip(*pieces, strict=True):
            count, sums = _sums(heads, *parts, known, merged.vocabulary)
            tokens, totals = tokens + count, totals + sums
    tokens = max(tokens, 1)  # none where the source lacks every target
    kl, merge_nll, source_nll = (totals / tokens).tolist()
    return Figures(
        tokens=tokens,
        kl=kl,
        perplexity=perplexity(merge_nll),
        source_perplexity=perplexity(source_nll),
    )


def _sums(
    heads: Sequence[Head],  # of the merge and of the source
    student: Tensor,  # states [tokens, width]
    teacher: Tensor,
    targets: Tensor,  # [tokens]
    known: Tensor | None,
    vocabulary: int,
) -> tuple[int, Tensor]:
    """How many tokens count, and the three sums over them."""
    if known is not None:  # a target that the source lacks says nothing about it
        mask = torch.isin(targets, known)
        targets = torch.searchsorted(known, targets[mask])
        student, teacher = student[mask], teacher[mask]
    sums = torch.zeros(3, dtype=torch.float64)
    for chunk in slices(len(targets), vocabulary):
        logits = [head(part[chunk]) for head, part in zip(heads, (student, teacher), strict=True)]
        merge, source = among(logits, known)
        means = (
            losses.kl(merge, source),
            F.cross_entropy(merge.float(), targets[chunk]),
            F.cross_entropy(source.float(), targets[chunk]),
        )
        sums += torch.stack(means).cpu() * len(merge)
    return len(targets), sums


def perplexity(nll: float) -> float:
    """Of a mean negative log-likelihood."""
    return math.exp(min(nll, 700.0))  # beyond that a float overflows
