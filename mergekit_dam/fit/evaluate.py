"""Held-out figures: how far the merge is from each source, and how well it predicts the text."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_dam import losses
from mergekit_dam.coefficients import Figures
from mergekit_dam.data import Row
from mergekit_dam.fit.batches import batch
from mergekit_dam.fit.objective import among, predicted
from mergekit_dam.model import MergedModel


@torch.no_grad()
def evaluate(
    merged: MergedModel,
    held_out: Sequence[Sequence[Row]],
    batch_size: int,
    known_tokens: Sequence[Tensor | None] | None = None,
) -> tuple[Figures, ...]:
    """One entry for each source; see `Plan.known_tokens` for the last argument."""
    known = known_tokens or [None] * len(held_out)
    return tuple(
        _figures(merged, source, rows, batch_size, known[source])
        for source, rows in enumerate(held_out)
    )


def _figures(
    merged: MergedModel,
    source: int,
    rows: Sequence[Row],
    batch_size: int,
    known: Tensor | None,
) -> Figures:
    tokens, kl, merge_nll, source_nll = 0, 0.0, 0.0, 0.0
    for inputs in _batches(rows, source, batch_size, merged.device):
        input_ids = inputs["input_ids"]
        mask = predicted(inputs["lengths"], inputs["starts"], input_ids.shape[1])
        targets = input_ids.roll(-1, dims=1)
        if known is not None:  # a target that the source lacks says nothing about it
            mask = mask & torch.isin(targets, known.to(targets.device))
            targets = torch.searchsorted(known.to(targets.device), targets)
        targets = targets[mask]
        logits = (merged(input_ids)[mask], merged.teach(source, input_ids)[mask])
        student, teacher = among(logits, known)
        count = len(targets)
        if count == 0:
            continue
        tokens += count
        kl += losses.kl(student, teacher).item() * count
        merge_nll += F.cross_entropy(student.float(), targets).item() * count
        source_nll += F.cross_entropy(teacher.float(), targets).item() * count
    tokens = max(tokens, 1)  # none where the source lacks every target
    return Figures(
        tokens=tokens,
        kl=kl / tokens,
        perplexity=_perplexity(merge_nll / tokens),
        source_perplexity=_perplexity(source_nll / tokens),
    )


def _perplexity(nll: float) -> float:
    return math.exp(min(nll, 700.0))  # beyond that a float overflows


def _batches(
    rows: Sequence[Row], source: int, batch_size: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Rows of similar length together, so that little padding is computed."""
    ordered = sorted(rows, key=len, reverse=True)
    for start in range(0, len(ordered), batch_size):
        chosen = ordered[start : start + batch_size]
        yield {k: v.to(device) for k, v in batch(chosen, [source] * len(chosen)).items()}
