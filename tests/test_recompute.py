"""Keeping activations, keeping nothing or keeping all: the same gradients, different memory."""

import importlib
import weakref
from collections import UserDict

import pytest
import tiny
import torch
import transformers
from mergekit.options import MergeOptions
from test_memory import OTHERS

from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.config import read_recipe
from mergekit_dam.errors import DamError
from mergekit_dam.fit import fit
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.model import recompute, weights
from mergekit_dam.model.live import Live

QUIET = MergeOptions(quiet=True)
MODES = ("block", "weights", "none")


@pytest.fixture
def make(recipe, tmp_path):
    def make(config: str | transformers.PretrainedConfig, **keys):
        config = tiny.CONFIGS[config] if isinstance(config, str) else config
        models = tiny.save_models(tmp_path, config, 2)
        return prepare(read_recipe(str(recipe(models, **keys))), QUIET, device="cpu").merged

    return make


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_gradients_are_the_same_to_the_last_bit(make, name):
    merged, found = make(name), {}
    for mode in MODES:
        merged.zero_grad()
        merged.recompute = mode
        merged(tiny.tokens()).square().mean().backward()
        found[mode] = [c.grad.clone() for c in merged.parameters()]
    for mode in ("weights", "none"):
        for one, other in zip(found["block"], found[mode], strict=True):
            assert torch.equal(one, other)


def test_a_block_may_be_gone_through_backwards_more_than_once(make):
    merged = make("llama")
    merged.recompute = "block"
    loss = merged(tiny.tokens()).square().mean()
    loss.backward(retain_graph=True)
    once = [c.grad.clone() for c in merged.parameters()]
    loss.backward()
    assert all(torch.equal(c.grad, 2 * g) for c, g in zip(merged.parameters(), once, strict=True))


def test_a_block_that_does_something_else_again_is_told(make):
    merged = make("llama")
    merged.recompute = "block"
    loss = merged(tiny.tokens()).square().mean()
    layer = merged.model.model.layers[1].block
    layer.forward = lambda hidden, *args, **kwargs: hidden
    with pytest.raises(DamError, match=r"model.layers.1 .*`dam.recompute: weights"):
        loss.backward()


class Lavish:
    """A block that makes what nothing uses, and something smaller each time, if it is to."""

    path = "a block"

    def __init__(self, *, is_steady: bool):
        self._is_steady, self._runs = is_steady, 0

    def weights(self, view, *, whole):
        return {}

    def run_each(self, calls, weights):
        (((given,), _),) = calls
        self._runs += 1
        x = 2 * given[: None if self._is_steady else len(given) - self._runs]
        x.exp()
        return x.sin().sum()


@pytest.mark.parametrize("is_steady", [True, False])
def test_what_nothing_used_is_not_made_again(is_steady):
    x = torch.rand(5, requires_grad=True)
    block = Lavish(is_steady=is_steady)
    calls = [((x,), {})]
    activations = recompute._Activations(block, calls)
    places, of = [], activations.of
    hooks = torch.autograd.graph.saved_tensors_hooks(
        activations.place, lambda place: places.append(place) or of(place)
    )
    with hooks:
        out = block.run_each(calls, {})
    if is_steady:
        out.backward()
        torch.testing.assert_close(x.grad, 2 * (2 * x.detach()).cos())
        assert [place.number for place in places] == [1]  # the second that was saved
        assert not activations._made
    else:
        with pytest.raises(DamError, match="something else each time"):
            out.backward()


@pytest.mark.parametrize("container", [UserDict, dict])
@pytest.mark.parametrize("goes_back", [True, False])
def test_what_layers_share_does_not_stay(make, monkeypatch, container, goes_back):
    """Keys and values, in a container to which layers write."""
    merged = make(OTHERS["gemma3n"][0])
    module = importlib.import_module(type(merged.model).__module__)
    monkeypatch.setattr(module, "KVSharingDict", container)
    merged.recompute = "block"
    with Live() as live:
        logits = merged(tiny.tokens())
        if goes_back:
            logits.sum().backward()
            merged.zero_grad()
        del logits
    assert live.now == 0


def test_a_failed_backward_pass_leaves_no_weights_after_the_next(make):
    merged = make("llama")
    merged.recompute = "weights"
    layer = merged.model.model.layers[0].block.mlp
    errors = iter([RuntimeError("in the middle")])

    def fails_once(*_):
        for error in errors:
            raise error

    layer.register_full_backward_hook(fails_once)
    loss = merged(tiny.tokens()).sum()
    with pytest.raises(RuntimeError, match="in the middle"):
        loss.backward(retain_graph=True)
    assert recompute._Again._last is not None
    loss.backward()
    assert recompute._Again._last is None


@pytest.mark.parametrize("mode", MODES)
def test_whose_weights_exist_together(make, monkeypatch, mode):
    """One block's at most, but with `none`: then all of them."""
    alive, most = [], 0
    combine_all = weights.combine_all

    def counting(*args, **kwargs):
        nonlocal most
        made = combine_all(*args, **kwargs)
        alive.extend(map(weakref.ref, made))
        most = max(most, sum(reference() is not None for reference in alive))
        return made

    monkeypatch.setattr(weights, "combine_all", counting)
    merged = make("llama")
    merged.recompute = mode
    merged(tiny.tokens()).sum().backward()
    of_a_layer, of_all = 9, 2 * 9 + 3
    if mode == "none":
        assert len(alive) == of_all
        assert most >= 2 * of_a_layer
    else:
        assert len(alive) > of_all  # some are made twice
        assert most <= of_a_layer + 1


def test_the_setting_changes_no_byte_of_the_file(recipe, tmp_path):
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama_tied"], 2)
    files = []
    for mode in ("auto", *MODES):
        path = str(recipe(models, dam={"recompute": mode}))
        fit(read_recipe(path), str(tmp_path / f"{mode}.safetensors"), QUIET, device="cpu")
        files.append(CoefficientFile(tmp_path / f"{mode}.safetensors"))
    for file in files[1:]:
        for name in files[0].names:
            assert torch.equal(file.get(name), files[0].get(name))
        assert file.header.results == files[0].header.results
