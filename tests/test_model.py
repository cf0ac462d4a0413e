"""The block-wise merged model against the real checkpoints and against plain autograd."""

from pathlib import Path

import pytest
import tiny
import torch
from mergekit.options import MergeOptions
from torch.func import functional_call

from mergekit_dam.config import read_recipe
from mergekit_dam.fit.prepare import Fit, prepare

QUIET = MergeOptions(quiet=True)


@pytest.fixture(params=tiny.CONFIGS)
def models(request, tmp_path: Path) -> list[Path]:
    return tiny.save_models(tmp_path, tiny.CONFIGS[request.param], 3)


def prepared(recipe, models: list[Path], **keys) -> Fit:
    return prepare(read_recipe(str(recipe(models, **keys))), QUIET, device="cpu")


def set_random(fit: Fit) -> dict[str, torch.Tensor]:
    """Random coefficients, as leaves of their own for a plain computation."""
    torch.manual_seed(0)
    with torch.no_grad():
        for coefficient in fit.merged.parameters():
            coefficient.copy_(torch.rand_like(coefficient))
    return {n: c.detach().clone().requires_grad_() for n, c in fit.merged.coefficients().items()}


def test_a_teacher_speaks_as_its_checkpoint_does(recipe, models):
    fit, ids = prepared(recipe, models), tiny.tokens()
    for number, folder in enumerate(models):
        expected = tiny.load(folder)(ids).logits
        torch.testing.assert_close(tiny.teach(fit.merged, number, ids), expected)


def test_one_hot_coefficients_give_the_source_exactly(recipe, models):
    fit, ids = prepared(recipe, models), tiny.tokens()
    for number in range(len(models)):
        with torch.no_grad():
            for coefficient in fit.merged.parameters():
                coefficient.zero_()[number] = 1
            assert torch.equal(fit.merged(ids), tiny.teach(fit.merged, number, ids))


def test_logits_and_gradients_equal_plain_autograd(recipe, models):
    fit, ids = prepared(recipe, models), tiny.tokens()
    leaves = set_random(fit)
    skeleton = tiny.load(models[0])
    loaded = dict(fit.plan.load(fit.plan.tensors))
    weights = {
        name: sum(
            c * loaded[name][source]
            for c, source in zip(leaves[name], fit.plan.sources, strict=True)
        )
        for name in leaves
    }
    tied = skeleton.all_tied_weights_keys
    parameters = {
        name: weights[tied.get(name, name)]
        for name, _ in skeleton.named_parameters(remove_duplicate=False)
    }
    expected = functional_call(skeleton, parameters, (ids,), tie_weights=False).logits
    direction = torch.randn_like(expected)
    (expected * direction).sum().backward()
    logits = fit.merged(ids)
    (logits * direction).sum().backward()
    torch.testing.assert_close(logits, expected)
    for name, coefficient in fit.merged.coefficients().items():
        gradient = leaves[name].grad
        assert (coefficient.grad - gradient).abs().max() <= 2e-5 * gradient.abs().max(), name


def test_every_tensor_of_the_checkpoint_has_coefficients(recipe, models):
    fit = prepared(recipe, models)
    assert set(fit.merged.coefficients()) == set(fit.plan.tensors)
    assert all(coefficient.requires_grad for coefficient in fit.merged.parameters())
    assert all(coefficient.dtype == torch.float32 for coefficient in fit.merged.parameters())


@pytest.fixture
def llamas(tmp_path: Path) -> list[Path]:
    return tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)


def test_columns_of_conv1d_are_its_inputs(recipe, tmp_path):
    fit = prepared(recipe, tiny.save_models(tmp_path, tiny.CONFIGS["gpt2"], 2))
    shapes = {name: tuple(c.shape) for name, c in fit.merged.coefficients().items()}
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (2, 16, 1)  # the weight is [16, 48]
    assert shapes["transformer.h.0.attn.c_attn.bias"] == (2, 1)
    assert shapes["transformer.h.0.ln_1.weight"] == (2, 16)
    assert shapes["transformer.wte.weight"] == (2, 1, 16)


def test_each_expert_has_its_own_columns(recipe, tmp_path):
    fit = prepared(recipe, tiny.save_models(tmp_path, tiny.CONFIGS["mixtral"], 2))
    shapes = {name: tuple(c.shape) for name, c in fit.merged.coefficients().items()}
    assert shapes["model.layers.0.mlp.experts.down_proj"] == (2, 4, 1, 24)


@pytest.mark.parametrize("kind", ["linear", "embedding", "norm", "bias"])
def test_each_kind_can_be_left_out_of_training(recipe, tmp_path, kind):
    models = tiny.save_models(tmp_path, tiny.CONFIGS["qwen2"], 2)
    fit = prepared(recipe, models, dam={"train": {kind: False}})
    everything = set(prepared(recipe, models).merged.trained_coefficients())
    left_out = everything - set(fit.merged.trained_coefficients())
    telling = {
        "linear": "model.layers.0.mlp.up_proj.weight",
        "embedding": "model.embed_tokens.weight",
        "norm": "model.layers.1.input_layernorm.weight",
        "bias": "model.layers.0.self_attn.q_proj.bias",
    }
    assert {k: telling[k] in left_out for k in telling} == {k: k == kind for k in telling}
    # No gradient of a weight is computed in vain.
    made = [fit.merged._views.merged(block.names()) for block in fit.merged._blocks]
    wanted = {name for own in made for name, weight in own.items() if weight.requires_grad}
    assert wanted == set(fit.merged.trained_coefficients())


def test_padding_is_irrelevant(recipe, llamas):
    fit, ids = prepared(recipe, llamas), tiny.tokens(rows=2)
    padded = torch.cat([ids, tiny.tokens(rows=2, length=5, seed=3)], dim=1)
    torch.testing.assert_close(fit.merged(padded)[:, : ids.shape[1]], fit.merged(ids))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_as_the_merge_writes_them(recipe, llamas, dtype):
    fit = prepared(recipe, llamas, dtype=dtype)
    set_random(fit)
    for name in fit.merged.coefficients():
        made = fit.merged._views.merged([name])[name]
        assert made.dtype == torch.float32  # computed in float32 on the CPU
        assert torch.equal(made, made.to(getattr(torch, dtype)).float())
    fit.merged(tiny.tokens()).sum().backward()
    assert all(c.grad.abs().sum() > 0 for c in fit.merged.parameters())


def test_gradients_of_float16_weights_are_not_rounded_to_float16(recipe, llamas):
    """As a GPU computes: in bfloat16, whose small numbers float16 does not have."""
    found = {}
    for dtype in ("float16", "float32"):
        computed = "bfloat16" if dtype == "float16" else dtype
        fit = prepared(recipe, llamas, dtype=dtype, dam={"compute_dtype": computed})
        (1e-8 * fit.merged(tiny.tokens()).float().sum()).backward()
        found[dtype] = {name: c.grad for name, c in fit.merged.coefficients().items()}
    for name, exact in found["float32"].items():
        error = (found["float16"][name] - exact).norm() / exact.norm()
        assert error < 0.1, name
