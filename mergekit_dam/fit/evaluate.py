"""Held-out figures: how far the merge is from each source, and how well it predicts the text."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_dam import losses
from mergekit_dam.coefficients import Figures
from mergekit_dam.config import Settings
from mergekit_dam.data import Row
from mergekit_dam.fit.batches import batch
from mergekit_dam.fit.chunks import slices
from mergekit_dam.fit.objective import among, row_states
from mergekit_dam.model import MergedModel


@torch.no_grad()
def evaluate(
    merged: MergedModel,
    held_out: Sequence[Sequence[Row]],
    together: int,  # rows that go through the model at once
    known_tokens: Sequence[Tensor | None] | None = None,
) -> tuple[Figures, ...]:
    """One entry for each source; see `Plan.known_tokens` for the last argument."""
    known = known_tokens or [None] * len(held_out)
    return tuple(
        _figures(merged, source, rows, together, known[source])
        for source, rows in enumerate(held_out)
    )


def rows_together(settings: Settings, sources: int) -> int:
    """Twice those of a step: without gradients they take less memory."""
    return 2 * settings.batch_size * sources


def _figures(
    merged: MergedModel,
    source: int,
    rows: Sequence[Row],
    together: int,
    known: Tensor | None,
) -> Figures:
    # Sums over tokens: of the KL, and of the text's surprise for the merge and for the source.
    tokens, totals = 0, torch.zeros(3, dtype=torch.float64)
    known = None if known is None else known.to(merged.device)
    heads = merged.head(), merged.head(source)
    for inputs in _batches(rows, source, together, merged.device):
        ids, ends, starts = (inputs[key] for key in ("input_ids", "lengths", "starts"))
        views = [(view, range(len(ids))) for view in (None, source)]
        states = [torch.cat(own) for own in row_states(merged, ids, ends, starts, views)]
        targets = torch.cat(
            [
                row[start + 1 : end]
                for row, start, end in zip(ids, starts.tolist(), ends.tolist(), strict=True)
            ]
        )
        if known is not None:  # a target that the source lacks says nothing about it
            mask = torch.isin(targets, known)
            targets = torch.searchsorted(known, targets[mask])
            states = [part[mask] for part in states]
        for chunk in slices(len(targets), merged.vocabulary):
            logits = [head(part[chunk]) for head, part in zip(heads, states, strict=True)]
            student, teacher = among(logits, known)
            means = (
                losses.kl(student, teacher),
                F.cross_entropy(student.float(), targets[chunk]),
                F.cross_entropy(teacher.float(), targets[chunk]),
            )
            totals += torch.stack(means).cpu() * len(student)
        tokens += len(targets)
    tokens = max(tokens, 1)  # none where the source lacks every target
    kl, merge_nll, source_nll = (totals / tokens).tolist()
    return Figures(
        tokens=tokens,
        kl=kl,
        perplexity=_perplexity(merge_nll),
        source_perplexity=_perplexity(source_nll),
    )


def _perplexity(nll: float) -> float:
    return math.exp(min(nll, 700.0))  # beyond that a float overflows


def _batches(
    rows: Sequence[Row], source: int, together: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Rows of similar length together, so that little padding is computed."""
    ordered = sorted(rows, key=len, reverse=True)
    for start in range(0, len(ordered), together):
        chosen = ordered[start : start + together]
        yield {k: v.to(device) for k, v in batch(chosen, [source] * len(chosen)).items()}
