"""`combine` against three lines of plain torch: values, gradients, dtypes, shapes, storage."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mergekit_dam.formula as formula_module
from mergekit_dam.formula import (
    FORMULAS,
    GRANULARITIES,
    alignment,
    coefficient_shape,
    combine,
    combine_all,
)
from mergekit_dam.inputs import Inputs

# name -> (S, what coefficient_shape is told, B for column, B for row)
LAYOUTS = {
    "linear": ((6, 5), {}, (1, 5), (6, 1)),
    "embedding": ((11, 5), {}, (1, 5), (11, 1)),
    "conv1d": ((6, 5), {"input_axis": -2}, (6, 1), (1, 5)),
    "norm": ((5,), {}, (5,), (5,)),
    "bias": ((5,), {"bias": True}, (1,), (5,)),
    "experts": ((3, 6, 5), {}, (3, 1, 5), (3, 6, 1)),
    "experts_conv1d": ((3, 6, 5), {"input_axis": -2}, (3, 6, 1), (3, 1, 5)),
}
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
GRANULARITY = pytest.mark.parametrize("granularity", GRANULARITIES)
FORMULA = pytest.mark.parametrize("formula", FORMULAS)


def plain(coefficients: Tensor, sources: list[Tensor], base: Tensor | None) -> Tensor:
    """The three lines: base + sum of c_i * D_i, in float32 (float64 for float64 sources)."""
    wide = torch.promote_types(torch.float32, sources[0].dtype)
    origin = torch.zeros((), dtype=wide) if base is None else base.to(wide)
    factors = zip(coefficients, sources, strict=True)
    return origin + sum(c.to(wide) * (source.to(wide) - origin) for c, source in factors)


def example(
    layout: str,
    granularity: str,
    formula: str = "weights",
    dtype: torch.dtype = torch.float32,
    count: int = 3,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Random coefficients, sources, and the base that the formula takes."""
    shape, options, _, _ = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(3)
    factors = coefficient_shape(shape, granularity, **options)
    coefficients = torch.randn((count, *factors), generator=generator)
    sources = [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]
    base = torch.randn(shape, generator=generator).to(dtype)
    return coefficients, sources, base if formula == "task_vectors" else None


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("written", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_is_rounded_twice_and_its_gradient_never(written, stored) -> None:
    """To what is written, and to what is computed with."""
    coefficients, sources, base = example("linear", "column", "task_vectors")
    inputs = [Inputs(tuple(sources), base, None)]
    leaf, other = (coefficients.clone().requires_grad_() for _ in range(2))
    (made,) = combine_all([leaf], inputs, [written], stored=stored)
    assert torch.equal(made, plain(other, sources, base).to(written).to(stored))
    upstream = torch.linspace(0, 1e-6, made.numel()).reshape(made.shape).to(stored)
    made.backward(upstream)
    plain(other, sources, base).backward(upstream.float())
    torch.testing.assert_close(leaf.grad, other.grad)


def test_several_at_once_are_as_each_alone() -> None:
    """Of which one is not trained and one not used: it gets no gradient."""
    examples = [example(layout, "column", "task_vectors") for layout in ("linear", "norm", "bias")]
    together = [c.clone().requires_grad_(n > 0) for n, (c, _, _) in enumerate(examples)]
    inputs = [Inputs(tuple(sources), base, None) for _, sources, base in examples]
    first, second, _ = combine_all(together, inputs, [torch.float32] * 3)
    (first.sum() + second.square().sum()).backward()
    assert together[0].grad is together[2].grad is None
    assert not first.requires_grad  # nothing is computed for it in vain
    c, sources, base = examples[1]
    alone = combine(c.requires_grad_(), sources, base)
    alone.square().sum().backward()
    assert torch.equal(second, alone)
    assert torch.equal(together[1].grad, c.grad)


@LAYOUT
def test_column_has_one_coefficient_for_each_input(layout: str) -> None:
    shape, options, column, _ = LAYOUTS[layout]
    assert coefficient_shape(shape, "column", **options) == column
    assert coefficient_shape(shape, **options) == column  # and is the default


@LAYOUT
def test_row_has_one_coefficient_for_each_output(layout: str) -> None:
    shape, options, _, row = LAYOUTS[layout]
    assert coefficient_shape(shape, "row", **options) == row


@LAYOUT
def test_tensor_has_one_coefficient_and_element_has_all(layout: str) -> None:
    shape, options, _, _ = LAYOUTS[layout]
    assert coefficient_shape(shape, "tensor", **options) == (1,) * len(shape)
    assert coefficient_shape(shape, "element", **options) == shape


@pytest.fixture(params=[None, 12, 2], ids=["whole", "rows", "single rows"])
def cached(request, monkeypatch) -> None:
    """A CPU works on large tensors in parts; here on tiny ones, too."""
    if request.param:
        monkeypatch.setattr(formula_module, "CACHED", request.param)


@FORMULA
@GRANULARITY
@LAYOUT
@pytest.mark.usefixtures("cached")
def test_values_and_gradients_are_plain_torchs(layout: str, granularity: str, formula: str) -> None:
    coefficients, sources, base = example(layout, granularity, formula)
    ours = coefficients.clone().requires_grad_()
    theirs = coefficients.clone().requires_grad_()
    upstream = torch.randn(sources[0].shape, generator=torch.Generator().manual_seed(5))
    merged, expected = combine(ours, sources, base), plain(theirs, sources, base)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    merged.backward(upstream)
    expected.backward(upstream)
    assert ours.grad.shape == coefficients.shape
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


@FORMULA
@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sums_in_float32_and_returns_the_sources_dtype(dtype: torch.dtype, formula: str) -> None:
    coefficients, sources, base = example("linear", "column", formula, dtype)
    coefficients.requires_grad_()
    merged = combine(coefficients, sources, base)
    assert merged.dtype == dtype
    expected = plain(coefficients, sources, base)
    torch.testing.assert_close(merged, expected.to(dtype), check_dtype=True)
    merged.sum().backward()
    assert coefficients.grad.dtype == torch.float32
    torch.testing.assert_close(
        coefficients.grad, torch.autograd.grad(expected.sum(), coefficients)[0]
    )


def test_float64_sources_are_summed_in_float64() -> None:
    coefficients, sources, _ = example("linear", "column", dtype=torch.float64)
    expected = sum(c.double() * source for c, source in zip(coefficients, sources, strict=True))
    torch.testing.assert_close(combine(coefficients, sources), expected, rtol=1e-14, atol=1e-14)


def test_bfloat16_is_rounded_once_at_the_end() -> None:
    ones = torch.ones(4, dtype=torch.bfloat16)
    # Added up in bfloat16, each of the small terms is lost beside the 1.
    coefficients = torch.tensor([1.0, *[0.002] * 8])[:, None]
    merged = combine(coefficients, [ones] * 9)
    assert torch.equal(merged, torch.full((4,), 1.016).bfloat16())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_sources_of_different_dtypes_are_not_rounded_to_the_first(order: tuple[int, int]) -> None:
    pair = [torch.full((4,), 0.5, dtype=torch.bfloat16), torch.full((4,), 0.123456)]
    sources = [pair[index] for index in order]
    merged = combine(torch.ones(2, 1), sources, dtype=torch.float32)
    torch.testing.assert_close(merged, torch.full((4,), 0.623456))
    assert combine(torch.ones(2, 1), sources).dtype == sources[0].dtype


def test_dtype_asks_for_another_result() -> None:
    coefficients, sources, _ = example("linear", "column", dtype=torch.bfloat16)
    merged = combine(coefficients, sources, dtype=torch.float32)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged, plain(coefficients, sources, None))


def test_gradient_reaches_coefficients_through_bfloat16() -> None:
    coefficients, sources, _ = example("linear", "column", dtype=torch.bfloat16)
    coefficients.requires_grad_()
    upstream = torch.randn(6, 5).bfloat16()
    combine(coefficients, sources).backward(upstream)
    expected = torch.stack([(upstream.float() * s.float()).sum(0, True) for s in sources])
    torch.testing.assert_close(coefficients.grad, expected)


def test_only_coefficients_get_a_gradient() -> None:
    coefficients, sources, base = example("linear", "column", "task_vectors")
    leaves = [tensor.requires_grad_() for tensor in (coefficients, *sources, base)]
    combine(coefficients, sources, base).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [True, False, False, False, False]


def test_sources_and_base_are_left_as_they_were() -> None:
    coefficients, sources, base = example("linear", "column", "task_vectors")
    before = [tensor.clone() for tensor in (coefficients, *sources, base)]
    combine(coefficients.requires_grad_(), sources, base).sum().backward()
    assert all(map(torch.equal, before, (coefficients, *sources, base)))


def test_the_same_source_twice_gets_its_gradient_twice() -> None:
    coefficients, (source, *_), _ = example("linear", "column")
    coefficients.requires_grad_()
    combine(coefficients, [source] * 3).sum().backward()
    torch.testing.assert_close(coefficients.grad, source.sum(0, True).expand(3, 1, 5))


@pytest.mark.usefixtures("cached")
def test_transposed_sources_give_the_same() -> None:
    coefficients, sources, _ = example("linear", "column")
    views = [source.T.contiguous().T for source in sources]
    assert torch.equal(combine(coefficients, views), combine(coefficients, sources))


def test_coefficients_for_another_number_of_sources_are_refused() -> None:
    coefficients, sources, _ = example("linear", "column")
    with pytest.raises(ValueError, match="3 coefficients for 2 sources"):
        combine(coefficients, sources[:2])


@FORMULA
def test_autograd_saves_no_product(formula: str) -> None:
    coefficients, sources, base = example("linear", "column", formula, torch.bfloat16)
    coefficients.requires_grad_()
    allowed = {tensor.data_ptr() for tensor in (*sources, coefficients)}
    allowed |= set() if base is None else {base.data_ptr()}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    def living() -> int:
        gc.collect()
        return sum(type(o) is Tensor and o.shape == (6, 5) for o in gc.get_objects())

    before = living()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        merged = combine(coefficients, sources, base)
    assert living() == before + 1  # the merged tensor itself
    assert {tensor.data_ptr() for tensor in saved} <= allowed
    # One node, straight to the coefficients: no chain of products behind it.
    parents = [node for node, _ in merged.grad_fn.next_functions if node is not None]
    assert [parent.variable is coefficients for parent in parents] == [True]


@pytest.mark.parametrize("at_once", [formula_module.CACHED, 5])
@FORMULA
def test_alignment_is_the_cosine_of_what_two_coefficients_scale(
    formula: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formula_module, "CACHED", at_once)
    _, (first, second, _), base = example("linear", "column", formula)
    d, e = (x if base is None else x - base for x in (first, second))
    expected = (d * e).sum(0, keepdim=True) / (d.norm(dim=0) * e.norm(dim=0))
    torch.testing.assert_close(alignment(first, second, base, (1, 5)), expected)


def test_alignment_of_a_tensor_with_itself_is_one_and_with_zeros_none() -> None:
    _, (source, *_), _ = example("linear", "column")
    torch.testing.assert_close(alignment(source, 3 * source, None, (1, 5)), torch.ones(1, 5))
    zeros = alignment(source, torch.zeros_like(source), None, (1, 5))
    assert torch.equal(zeros, torch.zeros(1, 5))


# ---- what must always hold

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
GRANULARITY_NAMES = st.sampled_from(GRANULARITIES)
AXES = st.sampled_from([-1, -2])
COUNTS = st.integers(1, 4)
SEEDS = st.integers(0, 10_000)
FEW = settings(max_examples=60, deadline=None, derandomize=True)


def draw(
    shape: tuple[int, ...], granularity: str, input_axis: int, count: int, seed: int
) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    factors = coefficient_shape(shape, granularity, input_axis=input_axis)
    coefficients = torch.randn((count, *factors), generator=generator)
    return coefficients, [torch.randn(shape, generator=generator) for _ in range(count)]


@settings(deadline=None, derandomize=True)
@given(SHAPES, GRANULARITY_NAMES, AXES, st.booleans())
def test_coefficients_always_broadcast_to_the_tensor(
    shape: tuple[int, ...], granularity: str, input_axis: int, bias: bool
) -> None:
    factors = coefficient_shape(shape, granularity, input_axis=input_axis, bias=bias)
    assert len(factors) == len(shape)
    assert torch.broadcast_shapes(factors, shape) == shape


@FEW
@given(SHAPES, GRANULARITY_NAMES, AXES, COUNTS, SEEDS, st.data())
def test_one_hot_coefficients_give_the_source_exactly(
    shape: tuple[int, ...],
    granularity: str,
    input_axis: int,
    count: int,
    seed: int,
    data: st.DataObject,
) -> None:
    coefficients, sources = draw(shape, granularity, input_axis, count, seed)
    chosen = data.draw(st.integers(0, count - 1))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    sources = [source.to(dtype) for source in sources]
    coefficients.zero_()
    coefficients[chosen] = 1
    assert torch.equal(combine(coefficients, sources), sources[chosen])


@FEW
@given(SHAPES, GRANULARITY_NAMES, AXES, COUNTS, SEEDS, st.floats(-3, 3), st.floats(-3, 3))
def test_merge_is_linear_in_the_coefficients(
    shape: tuple[int, ...],
    granularity: str,
    input_axis: int,
    count: int,
    seed: int,
    a: float,
    b: float,
) -> None:
    c, sources = draw(shape, granularity, input_axis, count, seed)
    d, _ = draw(shape, granularity, input_axis, count, seed + 1)
    left = combine(a * c + b * d, sources)
    right = a * combine(c, sources) + b * combine(d, sources)
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@FEW
@given(SHAPES, GRANULARITY_NAMES, COUNTS, SEEDS, st.randoms(use_true_random=False))
def test_equal_coefficients_do_not_mind_the_order_of_the_sources(
    shape: tuple[int, ...], granularity: str, count: int, seed: int, random
) -> None:
    coefficients, sources = draw(shape, granularity, -1, count, seed)
    coefficients.fill_(1 / count)
    shuffled = random.sample(sources, count)
    average = torch.stack(sources).mean(0)
    torch.testing.assert_close(combine(coefficients, sources), average, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(combine(coefficients, shuffled), average, rtol=1e-5, atol=1e-6)


@FEW
@given(SHAPES, GRANULARITY_NAMES, COUNTS, SEEDS)
def test_zero_coefficients_give_the_base_exactly(
    shape: tuple[int, ...], granularity: str, count: int, seed: int
) -> None:
    coefficients, sources = draw(shape, granularity, -1, count, seed)
    base = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
    zeros = torch.zeros_like(coefficients)
    assert torch.equal(combine(zeros, sources, base), base)
    assert torch.equal(combine(zeros, sources), torch.zeros(shape))
