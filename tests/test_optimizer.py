"""The optimiser's basis and its learning rates."""

import shutil
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_dam.config import read_recipe
from mergekit_dam.config.settings import Basis
from mergekit_dam.fit.optimizer import SMALLEST, STEP, DifferencesAdamW, parameter_groups
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.model.live import Live

FILE = "model.safetensors"
RATE, SHARE = 0.1, 0.25


def loss(c: Tensor, parts: Tensor) -> Tensor:  # [4, 1, 5], [4, 3, 5]
    return ((c * parts).sum(0) - 1).pow(4).mean()


def group(c: Tensor, middle: list[float], rows: list[int]) -> dict:
    b = torch.zeros_like(c[0]).requires_grad_()
    return {"params": [c, b], "lr": RATE, "middle": middle, "rows": rows, "share": SHARE}


@pytest.mark.parametrize(
    ("middle", "own"), [([0.0, 0.0, 0.0, 1.0], 3), ([0.25] * 4, 4)], ids=["base", "mean"]
)
def test_it_is_adamw_on_differences_from_a_middle(middle: list[float], own: int) -> None:
    torch.manual_seed(0)
    parts = torch.randn(4, 3, 5, dtype=torch.float64)
    m = torch.tensor(middle, dtype=torch.float64).reshape(4, 1, 1)
    c = torch.zeros(4, 1, 5, dtype=torch.float64)
    c[:own] = 1 / own
    u, b = c[:own].clone().requires_grad_(), torch.zeros(1, 5, dtype=torch.float64).requires_grad_()
    c.requires_grad_()
    ours = DifferencesAdamW([group(c, middle, list(range(own)))], weight_decay=0.0)
    groups = [{"params": [u], "lr": RATE}, {"params": [b], "lr": RATE * SHARE}]
    plain, before = torch.optim.AdamW(groups, weight_decay=0.0), loss(c, parts).item()
    for _ in range(20):
        spread = torch.cat([u, u.new_zeros(4 - own, 1, 5)])
        same = spread + m * (1 + b - u.sum(0))
        torch.testing.assert_close(c, same)
        for optimizer, value in ((ours, loss(c, parts)), (plain, loss(same, parts))):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert loss(c, parts) < before


@pytest.mark.parametrize("fused", [False, True])
def test_tensors_side_by_side_step_as_they_do_alone(fused: bool) -> None:
    """Of several shapes, middles and sources; of two learning rates."""
    torch.manual_seed(0)
    shapes = [(4, 1, 5), (4, 7), (4, 3, 1), (4, 1, 64)]
    parts = [torch.randn(shape) for shape in shapes]
    kinds = [([0.0, 0.0, 0.0, 1.0], [0, 1, 2]), ([0.0, 0.0, 0.0, 1.0], [0, 2])]
    kinds += [([0.25] * 4, [0, 1, 2, 3])] * 2
    results = []
    for is_joined in (True, False):
        cs = [torch.full(shape, 0.25, requires_grad=True) for shape in shapes]
        groups = [
            {**group(c, *kind), "lr": rate, "share": share}
            for c, kind, rate, share in zip(
                cs, kinds, (0.1, 0.1, 0.2, 0.1), (0.1, 0.9, 0.5, 0.3), strict=True
            )
        ]
        each = [groups] if is_joined else [[own] for own in groups]
        optimizers = [DifferencesAdamW(own, weight_decay=0.0, fused=fused) for own in each]
        for _ in range(10):
            for c in cs:
                c.grad = None
            sum(
                (c * part).sum(0).sub(1).pow(2).mean() for c, part in zip(cs, parts, strict=True)
            ).backward()
            for optimizer in optimizers:
                optimizer.step()
        results.append(cs)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert (one != 0.25).any()


def test_a_source_without_the_tensor_stays_out() -> None:
    c = torch.tensor([[0.5], [0.0], [0.5], [0.0]], requires_grad=True)
    ours = DifferencesAdamW([group(c, [0.0, 0.0, 0.0, 1.0], [0, 2])], weight_decay=0.0)
    (c[[0, 2, 3]] * torch.tensor([[1.0], [2.0], [3.0]])).sum().square().backward()
    ours.step()
    assert c[1] == 0
    assert (c[[0, 2]] != 0.5).all()


def test_other_groups_are_adamws() -> None:
    one, two = (torch.ones(2, 5, requires_grad=True) for _ in range(2))
    for value, kind in ((one, DifferencesAdamW), (two, torch.optim.AdamW)):
        optimizer = kind([{"params": [value], "lr": RATE}])
        for _ in range(3):
            optimizer.zero_grad()
            value.pow(3).sum().backward()
            optimizer.step()
    assert torch.equal(one, two)


def scaled(model: Path, copy: Path, factor: float) -> Path:
    shutil.copytree(model, copy)
    weights = {name: factor * tensor for name, tensor in load_file(copy / FILE).items()}
    save_file(weights, copy / FILE, metadata={"format": "pt"})
    return copy


def groups_of(path: Path, rate: float | None = None, basis: Basis = "differences") -> list[dict]:
    merged = prepare(read_recipe(str(path)), MergeOptions(quiet=True), device="cpu").merged
    return parameter_groups(merged, rate, basis)


@pytest.mark.parametrize("way", [0.5, 0.05])
def test_steps_follow_how_far_the_sources_are_apart(recipe, tmp_path, way: float) -> None:
    """Two models, one a step away from the other."""
    model = tiny.save_model(tmp_path / "a", tiny.CONFIGS["llama"], seed=0)
    other = scaled(model, tmp_path / "b", 1 + way)
    for found in groups_of(recipe([model, other]), basis="coefficients"):
        assert found["lr"] == pytest.approx(STEP * way / (2 + way), rel=0.05)
    for found in groups_of(recipe([model, other])):
        assert (found["lr"], found["rows"], found["middle"]) == (STEP, [0, 1], [0.5, 0.5])
        assert found["share"] == pytest.approx(way / (2 + way), rel=0.02)
    for found in groups_of(recipe([other], base_model=str(model))):
        assert (found["lr"], found["rows"], found["middle"]) == (STEP, [0], [0.0, 1.0])
        assert found["share"] == pytest.approx(way, rel=0.02)


def test_one_source_alone_has_no_differences(recipe, tmp_path) -> None:
    model = tiny.save_model(tmp_path / "a", tiny.CONFIGS["llama"], seed=0)
    for found in groups_of(recipe([model])):
        assert found["lr"] == SMALLEST
        assert len(found["params"]) == 1


def test_a_given_rate_is_that_of_every_tensor(recipe, tmp_path) -> None:
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 3)
    for path in (recipe(models[:2]), recipe(models[:2], base_model=str(models[2]))):
        assert {found["lr"] for found in groups_of(path, 0.01)} == {0.01}


@pytest.mark.parametrize("basis", ["differences", "coefficients"])
def test_it_is_built_in_the_memory_of_a_piece(recipe, tmp_path, basis) -> None:
    """Whole tensors in float32 would take more than a step."""
    config = transformers.LlamaConfig(**{**tiny.SIZES, "vocab_size": 40_000, "hidden_size": 64})
    models = tiny.save_models(tmp_path, config, 3, torch.bfloat16)
    path = recipe(models, dtype="bfloat16")
    merged = prepare(read_recipe(str(path)), MergeOptions(quiet=True), device="cpu").merged
    with Live() as live:
        parameter_groups(merged, None, basis)
    assert live.most < 40_000 * 64 * 4  # one copy of the embedding
