"""Every term of the objective against its definition, written out here."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergekit_dam import losses

TEMPERATURES = pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
DIVERGENCES = pytest.mark.parametrize("term", [losses.kl, losses.reverse_kl, losses.jsd])


def logits(seed: int, tokens: int = 7, vocabulary: int = 11) -> Tensor:
    return torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def kl_by_hand(p: Tensor, q: Tensor) -> float:
    """Mean over the tokens of sum over the vocabulary of p ln(p / q), in plain Python."""
    rows = zip(p.double().tolist(), q.double().tolist(), strict=True)
    sums = [sum(a * math.log(a / b) for a, b in zip(*row, strict=True)) for row in rows]
    return sum(sums) / len(sums)


def probabilities(values: Tensor, temperature: float) -> Tensor:
    return torch.softmax(values.double() / temperature, dim=-1)


@TEMPERATURES
def test_kl_is_t_squared_times_kl_of_teacher_to_student(temperature: float) -> None:
    student, teacher = logits(0), logits(1)
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    expected = temperature**2 * kl_by_hand(p, q)
    assert losses.kl(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)


@TEMPERATURES
def test_reverse_kl_is_t_squared_times_kl_of_student_to_teacher(temperature: float) -> None:
    student, teacher = logits(0), logits(1)
    p, q = probabilities(student, temperature), probabilities(teacher, temperature)
    expected = temperature**2 * kl_by_hand(p, q)
    actual = losses.reverse_kl(student, teacher, temperature).item()
    assert actual == pytest.approx(expected, rel=1e-5)
    assert actual != pytest.approx(losses.kl(student, teacher, temperature).item(), rel=1e-2)


@TEMPERATURES
def test_jsd_is_t_squared_times_the_mean_kl_to_the_mixture(temperature: float) -> None:
    student, teacher = logits(0), logits(1)
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    mixture = (p + q) / 2
    expected = temperature**2 * (kl_by_hand(p, mixture) + kl_by_hand(q, mixture)) / 2
    assert losses.jsd(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)


@TEMPERATURES
def test_entropy_is_t_squared_times_the_students_own(temperature: float) -> None:
    student = logits(0)
    q = probabilities(student, temperature)
    expected = temperature**2 * -(q * q.log()).sum(-1).mean().item()
    actual = losses.entropy(student, logits(1), temperature)
    assert actual.item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(actual, losses.entropy(student, logits(2), temperature))


def test_entropy_of_uniform_predictions_is_the_log_of_the_vocabulary() -> None:
    uniform = torch.zeros(3, 11)
    assert losses.entropy(uniform, uniform).item() == pytest.approx(math.log(11))


def test_mse_is_the_mean_squared_difference_of_the_logits() -> None:
    student, teacher = logits(0), logits(1)
    expected = (student.double() - teacher.double()).pow(2).sum().item() / (7 * 11)
    assert losses.mse(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(losses.mse(student, teacher, 2.0), losses.mse(student, teacher))


@pytest.mark.parametrize(
    "term", [losses.kl, losses.reverse_kl, losses.jsd, losses.mse, losses.entropy]
)
def test_doubling_the_tokens_with_copies_leaves_the_term(term) -> None:
    student, teacher = logits(0), logits(1)
    doubled = term(student.repeat(2, 1), teacher.repeat(2, 1), 2.0)
    torch.testing.assert_close(doubled, term(student, teacher, 2.0))


@pytest.mark.parametrize(
    "term", [losses.kl, losses.reverse_kl, losses.jsd, losses.mse, losses.entropy]
)
def test_low_precision_logits_are_compared_in_float32(term) -> None:
    student, teacher = logits(0).bfloat16(), logits(1).bfloat16()
    value = term(student, teacher, 2.0)
    assert value.dtype == torch.float32
    assert torch.equal(value, term(student.float(), teacher.float(), 2.0))


def test_gradient_of_kl_is_the_difference_of_the_predictions() -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    losses.kl(student, teacher, 2.0).backward()
    difference = probabilities(student.detach(), 2.0) - probabilities(teacher, 2.0)
    torch.testing.assert_close(student.grad.double(), 2.0 * difference / 7, rtol=1e-4, atol=1e-6)


@DIVERGENCES
def test_divergence_of_certain_opposites_is_finite(term) -> None:
    student = torch.tensor([[200.0, -200.0]], requires_grad=True)
    value = term(student, torch.tensor([[-200.0, 200.0]]))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


def test_jsd_of_certain_opposites_is_ln_2_times_t_squared() -> None:
    far = torch.tensor([[400.0, -400.0]])
    assert losses.jsd(far, -far, 2.0).item() == pytest.approx(4 * math.log(2), rel=1e-6)


LOGITS = st.integers(0, 10_000).flatmap(
    lambda seed: st.sampled_from([0.01, 1.0, 30.0]).map(lambda scale: logits(seed, 3, 5) * scale)
)
FEW = settings(max_examples=60, deadline=None, derandomize=True)


@FEW
@given(LOGITS, LOGITS, st.floats(0.2, 5))
def test_divergences_are_never_negative(student: Tensor, teacher: Tensor, t: float) -> None:
    for term in (losses.kl, losses.reverse_kl, losses.jsd):
        assert term(student, teacher, t).item() >= -1e-5


@FEW
@given(LOGITS, st.floats(0.2, 5), st.floats(-3, 3))
def test_divergences_are_zero_for_equal_predictions(
    student: Tensor, t: float, shift: float
) -> None:
    for term in (losses.kl, losses.reverse_kl, losses.jsd):
        assert term(student, student.clone(), t).item() == pytest.approx(0, abs=1e-5)
        assert term(student, student + shift, t).item() == pytest.approx(0, abs=1e-4)


@FEW
@given(st.integers(0, 10_000), st.integers(0, 4), st.floats(0.5, 5))
def test_divergences_are_positive_for_different_predictions(
    seed: int, token: int, t: float
) -> None:
    student = logits(seed, 3, 5) / 4  # none so certain that a token can be overlooked
    teacher = student.clone()
    teacher[:, token] += 2
    for term in (losses.kl, losses.reverse_kl, losses.jsd):
        assert term(student, teacher, t).item() > 1e-5


@FEW
@given(LOGITS, LOGITS, st.floats(0.2, 5))
def test_jsd_is_symmetric_and_at_most_ln_2(student: Tensor, teacher: Tensor, t: float) -> None:
    value = losses.jsd(student, teacher, t).item()
    assert value == pytest.approx(losses.jsd(teacher, student, t).item(), rel=1e-4, abs=1e-6)
    assert value <= t**2 * math.log(2) * (1 + 1e-5)


# ---- the coefficients' terms

PAIRS = [(0, 1), (0, 2), (1, 2)]


def coefficients(seed: int = 0, sources: int = 3) -> list[Tensor]:
    """A column-wise matrix, a norm and a bias."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sources, *b, generator=generator) for b in [(1, 5), (4,), (1,)]]


def uniform(sources: int = 3) -> list[Tensor]:
    return [torch.full_like(c, 1 / sources).requires_grad_() for c in coefficients(0, sources)]


def test_similarity_is_the_mean_pairwise_cosine() -> None:
    cs = coefficients()
    means = []
    for c in cs:
        rows = c.flatten(1).tolist()
        cosines = [
            sum(a * b for a, b in zip(rows[i], rows[j], strict=True))
            / (math.hypot(*rows[i]) * math.hypot(*rows[j]))
            for i, j in PAIRS
        ]
        means.append(sum(cosines) / 3)
    assert losses.similarity(cs).item() == pytest.approx(sum(means) / 3, rel=1e-5)


def test_similarity_has_no_gradient_at_the_uniform_start() -> None:
    cs = uniform()
    value = losses.similarity(cs)
    value.backward()
    assert value.item() == pytest.approx(1)
    assert all(torch.allclose(c.grad, torch.zeros(()), atol=1e-7) for c in cs)


def test_similarity_is_zero_for_sources_on_different_columns() -> None:
    assert losses.similarity([torch.eye(3)]).item() == 0


def test_similarity_does_not_mind_the_scale() -> None:
    cs = coefficients()
    scaled = losses.similarity([5 * c for c in cs])
    torch.testing.assert_close(scaled, losses.similarity(cs))


@pytest.mark.parametrize("size", [0.0, 1e-9])
def test_similarity_of_a_source_at_zero_moves_nothing(size) -> None:
    """It has no direction. Divided by next to nothing, its gradient would drown all others."""
    c = torch.tensor([[size, size], [1.0, 2.0], [-1.0, 1.0]], requires_grad=True)
    value = losses.similarity([c])
    value.backward()
    others = c.detach()[1:].requires_grad_()
    alone = losses.similarity([others]) / 3  # one of three pairs
    alone.backward()
    torch.testing.assert_close(value, alone)
    assert not c.grad[0].any()
    torch.testing.assert_close(c.grad[1:], others.grad)


def test_l1_is_the_sum_of_magnitudes() -> None:
    expected = sum(abs(x) for c in coefficients() for x in c.flatten().tolist())
    assert losses.l1(coefficients()).item() == pytest.approx(expected, rel=1e-5)


def test_l2_is_the_sum_of_each_sources_norm() -> None:
    expected = sum(math.hypot(*row) for c in coefficients() for row in c.flatten(1).tolist())
    assert losses.l2(coefficients()).item() == pytest.approx(expected, rel=1e-5)


def overlap_by_hand(cs: list[Tensor], weights: list[Tensor]) -> float:
    """`weights` has a row for each of PAIRS."""
    total = 0.0
    for c, weight in zip(cs, weights, strict=True):
        rows, factors = c.abs().flatten(1).tolist(), weight.flatten(1).tolist()
        shared = [
            sum(min(a, b) * w for a, b, w in zip(rows[i], rows[j], factors[pair], strict=True))
            for pair, (i, j) in enumerate(PAIRS)
        ]
        total += sum(shared) / len(shared)
    return total


def test_overlap_is_what_two_sources_both_claim() -> None:
    expected = overlap_by_hand(coefficients(), [torch.ones_like(c) for c in coefficients()])
    assert losses.overlap(coefficients()).item() == pytest.approx(expected, rel=1e-5)


def test_overlap_is_zero_for_sources_on_different_columns() -> None:
    assert losses.overlap([torch.eye(3)]).item() == 0


def test_weighted_overlap_weighs_each_pairs_claims() -> None:
    weights = [weight.abs() for weight in coefficients(1)]  # three sources have three pairs
    expected = overlap_by_hand(coefficients(), weights)
    assert losses.overlap(coefficients(), weights).item() == pytest.approx(expected, rel=1e-5)


def test_weighted_overlap_of_one_source_is_nothing() -> None:
    cs = coefficients(sources=1)
    assert losses.overlap(cs, [torch.ones(0, *c.shape[1:]) for c in cs]).item() == 0


@pytest.mark.parametrize("term", [losses.similarity, losses.overlap])
def test_one_source_has_no_pairs(term) -> None:
    value = term(coefficients(sources=1))
    assert value.item() == 0
    elsewhere = [c.to("meta") for c in coefficients(sources=1)]
    assert term(elsewhere).device.type == "meta"  # as any term, with which it is logged


@pytest.mark.parametrize("term", [losses.similarity, losses.l1, losses.l2, losses.overlap])
def test_no_trained_tensors_cost_nothing(term) -> None:
    assert term([]).item() == 0


@pytest.mark.parametrize("term", [losses.similarity, losses.l1, losses.l2, losses.overlap])
def test_coefficient_terms_do_not_mind_the_order_of_the_sources(term) -> None:
    cs = coefficients()
    torch.testing.assert_close(term([c[[2, 0, 1]] for c in cs]), term(cs))


@pytest.mark.parametrize("term", [losses.l1, losses.l2, losses.overlap])
def test_coefficient_terms_have_finite_gradients_at_zero(term) -> None:
    cs = [torch.zeros_like(c).requires_grad_() for c in coefficients()]
    value = term(cs)
    value.backward()
    assert value.item() == 0
    assert all(torch.isfinite(c.grad).all() for c in cs)


@FEW
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_similarity_is_between_minus_one_and_one(seed: int, sources: int) -> None:
    assert -1 - 1e-5 <= losses.similarity(coefficients(seed, sources)).item() <= 1 + 1e-5
