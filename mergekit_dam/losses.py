"""The terms of the objective (arXiv 2410.08371, section 3.2): pure functions, no state.

Of the logits: `student` is the merge, `teacher` the source, both [tokens, vocabulary], real
tokens only; each term is a mean over tokens, in nats where it is a divergence, and is computed
in float32. Of the coefficients: a list with one [N, *B] tensor for each output tensor.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 1e-6  # up to this length a vector of coefficients has no direction


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:  # [tokens, vocabulary]
    logits = logits.float()
    if temperature != 1:  # else it would be a pass over all logits for nothing
        logits = logits / temperature
    return F.log_softmax(logits, dim=-1)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of log-probabilities [tokens, vocabulary]: sum over the vocabulary, mean over
    the tokens."""
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · KL(teacher ‖ student). T² keeps the gradient's size (Hinton et al., 2015)."""
    p, q = (_log_probabilities(logits, temperature) for logits in (teacher, student))
    return temperature**2 * _divergence(p, q)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · KL(student ‖ teacher): seeks the source's modes rather than covers them."""
    return kl(teacher, student, temperature)


def jsd(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · Jensen-Shannon divergence: the mean KL of both to their mixture, at most ln 2 · T²."""
    p, q = (_log_probabilities(logits, temperature) for logits in (teacher, student))
    mixture = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
    return temperature**2 * (_divergence(p, mixture) + _divergence(q, mixture)) / 2


def mse(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Squared difference of the logits, mean over vocabulary and tokens; T plays no part."""
    return F.mse_loss(student.float(), teacher.float())


def entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · entropy of the student's own predictions; the teacher plays no part."""
    q = _log_probabilities(student, temperature)
    return temperature**2 * -(q.exp() * q).sum(-1).mean()


def similarity(coefficients: Sequence[Tensor]) -> Tensor:
    """Cosine of c_i and c_j, mean over the pairs of sources, mean over the tensors.

    At a uniform start its gradient is exactly zero: parallel vectors are at the maximum. A zero
    vector has no direction: its cosines are 0, and so is its gradient.
    """
    alike = defaultdict(list)  # by shape, since one operation serves for all tensors of a shape
    for c in coefficients:
        alike[c.flatten(1).shape].append(c.flatten(1))
    cosines = []
    for (count, _), members in alike.items():
        if count > 1:
            unit = _unit(torch.stack(members))  # [tensors, N, K]
            sums = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))  # over both orders
            cosines.append(sums / (count * (count - 1)))
    return torch.cat(cosines).mean() if cosines else _nothing(coefficients)


def _unit(vectors: Tensor) -> Tensor:
    """Of length 1, along the last axis, or 0: a division by next to nothing would have a
    gradient without bounds."""
    length = vectors.norm(dim=-1, keepdim=True)
    return vectors / length.where(length > SHORT, torch.inf)


def l1(coefficients: Sequence[Tensor]) -> Tensor:
    """Σ |c| over all coefficients."""
    return _sum([c.abs().sum() for c in coefficients], coefficients)


def l2(coefficients: Sequence[Tensor]) -> Tensor:
    """Σ ‖c_i‖₂ over sources and tensors: the norm, not its square, as published."""
    return _sum([c.flatten(1).norm(dim=1).sum() for c in coefficients], coefficients)


def overlap(coefficients: Sequence[Tensor], interference: Sequence[Tensor] | None = None) -> Tensor:
    """Σ min(|c_i|, |c_j|), mean over the pairs of sources, summed over the tensors: how far two
    sources claim the same columns.

    `interference` (`weighted_overlap`) has a weight for each such minimum, [pairs, *B] for each
    tensor: see `fit.objective.interference`.
    """
    shared = []
    for index, c in enumerate(coefficients):
        first, second = _pairs(c.abs().flatten(1))
        claimed = torch.minimum(first, second)  # [K, pairs]
        if interference is not None:
            claimed = claimed * interference[index].flatten(1).T
        if claimed.shape[1]:
            shared.append(claimed.sum(0).mean())
    return _sum(shared, coefficients)


def _pairs(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs i < j of the rows of [N, K]: two tensors [K, pairs], empty for one source."""
    i, j = torch.triu_indices(len(vectors), len(vectors), offset=1, device=vectors.device)
    return vectors[i].T, vectors[j].T


def _sum(terms: Sequence[Tensor], coefficients: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum() if terms else _nothing(coefficients)


def _nothing(coefficients: Sequence[Tensor]) -> Tensor:
    """Where these are, since the terms of a step are stacked for its log."""
    return coefficients[0].new_zeros(()) if coefficients else torch.zeros(())
