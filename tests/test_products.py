"""Layers' products on a CPU whose maker MKL does not know: within rounding what torch computes."""

import random

import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.options import MergeOptions
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mergekit_dam import products
from mergekit_dam.config import read_recipe
from mergekit_dam.data import Row, SourceData
from mergekit_dam.fit.batches import StepRows, collate
from mergekit_dam.fit.objective import Distillation
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.fit.workload import items_of_a_fit
from mergekit_dam.model.live import Live
from mergekit_dam.products import LEAST, PART, fast_products, kept_code

CPU = torch.device("cpu")
MODES = ("block", "weights", "none")
SIZES = [512, 513, 600]  # a weight of any two has LEAST numbers

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"
)


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    """As on a processor where it is, whatever this one's maker."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)


def results(x: Tensor, weight: Tensor, bias: Tensor | None, outer: Tensor) -> list[Tensor]:
    """A layer's outputs and its gradients."""
    trained = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = F.linear(*trained)
    return [y.detach(), *torch.autograd.grad(y, trained, outer.to(y.dtype))]


def served(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes that oneDNN is given from now on: of a product [rows, out, in]."""
    given, by_onednn = [], products._by_onednn

    def seen(x, weight, bias=None):
        given.append((len(x), *weight.shape))
        return by_onednn(x, weight, bias)

    monkeypatch.setattr(products, "_by_onednn", seen)
    return given


LAYOUTS = {
    "as it is": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "of one row": lambda x: x[..., :1, :].expand_as(x),
    "every other": lambda x: torch.stack([x, x], -1)[..., 0],
}


@given(
    rows=st.sampled_from([(PART,), (3, 100), (2, 64, 3), (5 * PART + 1,), (1, 2 * PART - 1)]),
    inputs=st.sampled_from(SIZES),
    outputs=st.sampled_from([*SIZES, 1500]),
    layout=st.sampled_from(list(LAYOUTS)),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_a_layer_and_its_gradients_are_what_torch_computes(
    rows, inputs, outputs, layout, has_bias, seed
):
    torch.manual_seed(seed)
    change = LAYOUTS[layout]
    x, outer = change(torch.randn(*rows, inputs)), change(torch.randn(*rows, outputs))
    weight, bias = change(torch.randn(outputs, inputs)), torch.randn(outputs) * has_bias
    tensors = x, weight, bias if has_bias else None
    exact = [t if t is None else t.double() for t in tensors]
    summands = results(*(t if t is None else t.abs() for t in exact), outer.abs())
    with fast_products(CPU):
        found = results(*tensors, outer)
    for expected, own, size in zip(results(*exact, outer), found, summands, strict=True):
        assert own.shape == expected.shape
        assert bool(((own - expected).abs() <= 1e-5 * size).all())


def test_whole_parts_go_to_onednn_and_the_rest_to_torch(monkeypatch):
    shapes, x = served(monkeypatch), torch.randn(2 * PART + 5, 400)
    with fast_products(CPU):
        results(x, torch.randn(700, 400), None, torch.ones(len(x), 700))
    first, back, *summed = shapes
    assert first == (2 * PART, 700, 400)
    assert back == (2 * PART, 400, 700)
    assert summed == [(512, 400, 2 * PART), (188, 400, 2 * PART)]


def test_logits_are_not_copied_for_what_is_left(monkeypatch):
    shapes, x, weight = served(monkeypatch), torch.randn(PART + 1, 16), torch.randn(LEAST // 16, 16)
    with fast_products(CPU), Live() as live:
        found = F.linear(x, weight)
    assert shapes == []
    assert live.most == found.nbytes
    with fast_products(CPU):
        F.linear(x[:PART], weight)
    assert shapes == [(PART, *weight.shape)]


@pytest.mark.parametrize(
    "x, weight",
    [
        (torch.randn(PART - 1, 512), torch.randn(512, 512)),
        (torch.randn(PART, 511), torch.randn(512, 511)),
        (torch.randn(PART, 512).bfloat16(), torch.randn(512, 512).bfloat16()),
        (torch.randn(PART, 512).double(), torch.randn(512, 512).double()),
        (torch.randn(PART, LEAST), torch.randn(LEAST)),
        (torch.randn(PART, 512), torch.randn(512, 512).as_subclass(type("Own", (Tensor,), {}))),
    ],
    ids=["few rows", "a small weight", "bfloat16", "float64", "a vector", "its own"],
)
def test_other_products_stay_as_they_are(monkeypatch, x, weight):
    shapes = served(monkeypatch)
    with fast_products(CPU):
        found = F.linear(x, weight)
    assert torch.equal(found, F.linear(x, weight))
    assert shapes == []


@pytest.mark.parametrize(
    "bias",
    [torch.randn(1200)[::2], torch.randn(1).expand(600), torch.randn(1), torch.randn(1, 600)],
    ids=["every other", "one for all", "of one", "of a row"],
)
def test_nor_does_any_bias_go_there(bias):
    x, weight = torch.randn(PART, 512), torch.randn(600, 512)
    with fast_products(CPU):
        found = F.linear(x, weight, bias)
    assert torch.equal(found, F.linear(x, weight, bias))


def test_it_keeps_what_torch_keeps():
    x, weight = torch.randn(PART, 512), torch.randn(600, 512)
    for x_trained, weight_trained in ((True, True), (True, False), (False, True), (False, False)):
        kept = []
        for device in (CPU, torch.device("cuda")):  # there it is as usual
            own = []
            given = x.requires_grad_(x_trained), weight.requires_grad_(weight_trained)
            with saved_tensors_hooks(own.append, lambda nothing: nothing), fast_products(device):
                F.linear(*given)
            kept.append({tensor.data_ptr() for tensor in own})
        assert kept[0] == kept[1]


def test_results_may_be_changed_in_place():
    x = torch.randn(2, PART, 512, requires_grad=True)
    with fast_products(CPU):
        y = F.linear(x, torch.eye(512))
        y[0] *= 2
        y.sum().backward()
    assert torch.equal(x.grad, torch.stack([torch.full_like(x[0], 2), torch.ones_like(x[1])]))


@pytest.fixture
def wide(monkeypatch):
    """Every product of a small model is large enough."""
    monkeypatch.setattr(products, "PART", 8)
    monkeypatch.setattr(products, "LEAST", 16)
    monkeypatch.setattr(products, "SUMMED", 24)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_a_fits_gradients_are_the_same_within_rounding(recipe, tmp_path, wide, monkeypatch, name):
    found = {}
    models = tiny.save_models(tmp_path, tiny.CONFIGS[name], 2)
    for offload in ("none", "disk"):
        config = str(recipe(models, offload=offload))
        merged = prepare(read_recipe(config), MergeOptions(quiet=True), device="cpu").merged
        for mode in MODES:
            shapes = served(monkeypatch)
            found[offload, mode] = _gradients(merged, mode)
            assert _layers(merged) <= {shape[1:] for shape in shapes}
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    plain = _gradients(merged, "block")
    for own in found.values():
        for one, other, expected in zip(own, found["none", "block"], plain, strict=True):
            assert torch.equal(one, other)  # however it is made, and wherever the sources are
            assert torch.allclose(one, expected, rtol=1e-3, atol=1e-5 * expected.abs().max())


def _layers(merged) -> set[tuple[int, int]]:
    """The shapes of all but the head's, whose rows are not whole parts."""
    modules = [own for block in merged._blocks[:-1] for own in block.modules()]
    return {tuple(own.weight.shape) for own in modules if isinstance(own, torch.nn.Linear)}


def _gradients(merged, mode: str) -> list[Tensor]:
    merged.zero_grad()
    merged.recompute = mode
    merged(tiny.tokens()).square().mean().backward()
    return [c.grad.clone() for c in merged.parameters()]


def test_a_model_on_a_gpu_knows_nothing_of_it():
    usual = F.linear
    with fast_products(torch.device("cuda")):
        assert F.linear is usual
    with pytest.raises(KeyError), fast_products(CPU):
        assert F.linear is not usual
        raise KeyError
    assert F.linear is usual


@pytest.mark.parametrize(
    "processor, is_faster",
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, True),
        ({"cpu_name": "AMD Ryzen 5 5600X", "avx512_f": False}, False),
        ({"cpu_name": "Intel Xeon", "avx512_f": True}, False),
        ({}, False),
    ],
)
def test_the_processor_decides(monkeypatch, processor, is_faster):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor, raising=False)
    products.onednn_is_faster.cache_clear()
    try:
        assert products.onednn_is_faster() == is_faster
    finally:
        products.onednn_is_faster.cache_clear()


def test_code_is_counted_once_for_each_number_of_parts(monkeypatch):
    of_one = products.CODE
    layers = [(512, 512), (600, 512), (512, 512), (10, 10)]

    def counted(trained, untrained, dtype=torch.float32, device=CPU):
        return kept_code(layers, trained, untrained, dtype, device)

    assert counted([5 * PART, 5 * PART + 7], []) == 2 * 3 * of_one
    assert counted([PART - 1], range(3 * PART)) == 2 * 2 * of_one
    assert counted([], range(5000 * PART)) == products.MOST * of_one
    assert counted([5 * PART], [PART], torch.bfloat16) == 0
    assert counted([5 * PART], [PART], device=torch.device("cuda")) == 0
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    assert counted([5 * PART], [PART]) == 0


def test_the_code_of_all_steps_is_foreseen(recipe, tmp_path, wide, monkeypatch):
    """That of the layers, whose rows are a group's, or a source's of them."""
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    chance = random.Random(0)
    lengths = [[chance.randint(3, 40) for _ in range(30)] for _ in models]
    data = [SourceData([Row([5] * n) for n in own], []) for own in lengths]
    path = recipe(models, dam={"batch_size": 2, "steps": 20})
    found = prepare(read_recipe(str(path)), MergeOptions(quiet=True), device="cpu", data=data)
    step, stepped = Distillation(found.merged, found.settings.objective), StepRows(data)
    items, shapes = list(items_of_a_fit(stepped.lengths, found.settings)), served(monkeypatch)
    for start in range(0, len(items), 2):
        step(**collate([stepped[item] for item in items[start : start + 2]]))["loss"].backward()
    layers = _layers(found.merged)
    made = {shape for shape in shapes if shape[1:] in layers or shape[:0:-1] in layers}
    assert len(made) > 20
    assert len(made) <= found.needs.code / products.CODE
    assert found.place.step == found.needs.of(found.place.recompute) + found.needs.code
