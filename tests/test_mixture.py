"""Rows of several sources in one pass: each has what its source's own pass gives it."""

import functools
import itertools

import pytest
import tiny
import torch
import torch.nn.functional as F
import yaml
from architectures import FITTED, Architecture
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.options import MergeOptions
from torch import nn

from mergekit_dam.config import read_recipe
from mergekit_dam.config.settings import Objective
from mergekit_dam.data import Row
from mergekit_dam.fit.batches import batch
from mergekit_dam.fit.objective import Distillation, row_states
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.model import Block, MergedModel, Mixture, NotMixedError, mixture
from mergekit_dam.model.live import Live
from mergekit_dam.model.mixture import Mixer, agrees

LENGTHS = (12, 12, 12, 7, 3)
ROWS = [Row([(7 * row + place) % 36 + 4 for place in range(n)]) for row, n in enumerate(LENGTHS)]
STEP = batch(ROWS, [0, 1, 2, 1, 0])
# Their experts and state spaces see tokens without their rows; OPT's positions come from a mask;
# a layer of Gemma 4 has a weight of its own; Lfm2 and the Qwens read weights of a convolution.
APART = {
    "Lfm2", "Mamba", "Mamba2", "Zamba2", "FalconH1", "Mixtral", "Qwen2Moe", "Qwen3Moe",
    "Qwen3Next", "Qwen3_5", "Qwen3VLMoe", "GraniteMoe", "GraniteMoeHybrid", "Glm4Moe", "Afmoe",
    "Olmoe", "GptOss", "MiniMaxM2", "DeepseekV2", "Llama4", "OPT", "Gemma4",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _also_on_a_cpu(monkeypatch):
    monkeypatch.setattr(mixture, "DEVICES", {"cpu", "cuda"})


@pytest.fixture
def make(recipe, tmp_path):
    def make(config=tiny.CONFIGS["llama"], **dam) -> MergedModel:
        return read(recipe(tiny.save_models(tmp_path, config, 3), dam=dam))

    return make


def read(path) -> MergedModel:
    return prepare(read_recipe(str(path)), MergeOptions(quiet=True), device="cpu").merged


def losses(model: MergedModel, *, mixes: bool, **step) -> dict[str, torch.Tensor]:
    model._mixer.works = mixes
    return Distillation(model, Objective())(**(step or STEP))


def require_same(model: MergedModel, **step) -> None:
    one, other = (losses(model, mixes=mixes, **step) for mixes in (False, True))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", FITTED, ids=lambda own: own.name)
def test_of_each_architecture(architecture: Architecture, recipe, tmp_path):
    model = read(recipe([architecture.save(tmp_path / f"m{n}", n) for n in range(2)]))
    kind = architecture.name.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration")
    assert model.mixes() == (kind not in APART)
    if model.mixes():
        require_same(model, **batch(ROWS, [0, 1, 1, 1, 0]))


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 14)), min_size=1, max_size=7),
    start=st.integers(0, 1),
)
def test_of_any_rows(shared_model, rows, start):
    rows = sorted(rows)
    own = [Row([(5 * n + place) % 36 + 4 for place in range(length)], start)
           for n, (_, length) in enumerate(rows)]  # fmt: skip
    require_same(shared_model, **batch(own, [source for source, _ in rows]))


@pytest.fixture(scope="module")
def shared_model(tmp_path_factory):
    """Of real models, whose rows hypothesis chooses."""
    folder = tmp_path_factory.mktemp("mixture")
    models = tiny.save_models(folder, tiny.CONFIGS["gemma3"], 3)
    text = tiny.write_jsonl(folder / "rows.jsonl", [{"text": t} for t in tiny.sentences(12, 1)])
    document = {
        "merge_method": "dam",
        "models": [{"model": str(model)} for model in models],
        "parameters": {"coefficients": str(folder / "dam.safetensors")},
        "dam": {"data": [{"source": str(model), "path": str(text)} for model in models]},
    }
    (folder / "config.yml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return read(folder / "config.yml")


def test_what_is_between_the_weights_runs_once(make, monkeypatch):
    model, calls, silu = make(), [], F.silu
    losses(model, mixes=True)
    monkeypatch.setattr(F, "silu", lambda *a, **k: calls.append(a) or silu(*a, **k))
    counts = []
    for mixes in (False, True):
        calls.clear()
        losses(model, mixes=mixes)
        counts.append(len(calls) // model.model.config.num_hidden_layers)
    merge, each, together = 3, 5, 3  # passes: of three lengths; of each source's lengths; of three
    assert counts == [merge + each, merge + together]


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_where_the_sources_live_changes_no_bit(recipe, tmp_path, where):
    models = tiny.save_models(tmp_path, tiny.CONFIGS["qwen2"], 3)
    found = []
    for offload in ("none", where):
        model = read(recipe(models, dam={"offload": offload}))
        step = losses(model, mixes=True)
        step["loss"].backward()
        found.append([*step.values(), *(c.grad for c in model.parameters())])
    assert all(itertools.starmap(torch.equal, zip(*found, strict=True)))


def test_sources_with_other_layers_are_passes_of_their_own(recipe, tmp_path):
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    other = tiny.CONFIGS["llama"].to_dict() | {"rms_norm_eps": 0.1}
    config = type(tiny.CONFIGS["llama"])(**other)
    models += [tiny.save_model(tmp_path / "other", config, 5)]
    assert not read(recipe(models, base_model=str(models[0]))).mixes()


def test_a_cpu_gains_nothing(make, monkeypatch):
    monkeypatch.undo()
    assert not make().mixes()


@pytest.mark.parametrize(
    "own, keys",
    [
        ("float32", {"dtype": "float32", "dam": {"compute_dtype": "bfloat16"}}),
        ("float32", {"out_dtype": "bfloat16", "dam": {"compute_dtype": "bfloat16"}}),
        ("bfloat16", {"dtype": "bfloat16"}),  # one of three
    ],
)
def test_copies_of_weights_are_not_held_for_all_sources(recipe, tmp_path, own, keys):
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 3)
    models[2] = tiny.cast(models[2], tmp_path / "cast", getattr(torch, own))
    assert not read(recipe(models, **keys)).mixes()


def broken(monkeypatch, error: type[BaseException] | None = None) -> None:
    """Rows of 12 fail in the second layer: by an error, or since it sees other positions."""
    run = Mixer.run_each

    def run_each(self, block, weights, mixture, calls):
        if mixture.length == 12 and block.path.endswith("layers.1"):
            calls = [((args[0][:, :5],), kwargs) for args, kwargs in calls]
            if error:
                monkeypatch.setattr(block.block, "forward", raising(error))
        return run(self, block, weights, mixture, calls)

    monkeypatch.setattr(Mixer, "run_each", run_each)


def raising(error: type[BaseException]):
    def fail(*args, **kwargs):
        raise error("no such number")

    return fail


@pytest.mark.parametrize("offload", ["none", "disk"])
@pytest.mark.parametrize("recompute", ["block", "weights", "none"])
def test_what_fails_later_goes_on_one_by_one(make, monkeypatch, offload, recompute):
    model, found, told = make(offload=offload), [], []
    monkeypatch.setattr(mixture.LOG, "warning", lambda text, *parts: told.append(text % parts))
    model.recompute = recompute
    for _ in range(2):
        model.zero_grad()
        step = losses(model, mixes=bool(found))
        step["loss"].backward()
        found.append([*step.values(), *(c.grad.clone() for c in model.parameters())])
        broken(monkeypatch)
    assert all(itertools.starmap(torch.equal, zip(*found, strict=True)))
    assert not model.mixes()
    assert len(told) == 1 and "layers.1 cannot run for several sources at once" in told[0]


def test_a_pass_that_has_failed_is_not_held(make, monkeypatch):
    model = make()
    model.recompute = "none"
    most = []
    for _ in range(2):
        losses(model, mixes=False)
        with Live() as live:
            losses(model, mixes=bool(most))
        most.append(live.most)
        broken(monkeypatch)
    assert most[1] <= 1.05 * most[0]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_what_would_not_go_one_by_one_either_is_raised(make, monkeypatch, error):
    model = make()
    broken(monkeypatch, error)
    with pytest.raises(error):
        losses(model, mixes=True)
    assert model.mixes()


@pytest.mark.parametrize("kept", [(0,), (0, 2), (0, 1, 2)])
def test_some_are_kept(make, kept):
    """Their states come from elsewhere; the others teach together."""
    model = make()

    def teach(source, ids, lengths, starts):
        if source not in kept:
            return None
        (states,) = row_states(model, ids, lengths, starts, [(source, range(len(ids)))])
        return states

    expected = losses(model, mixes=True)
    found = Distillation(model, Objective(), teach=teach)(**STEP)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


class Scaled(nn.Module):
    """Something with one weight [width]."""

    def __init__(self, how):
        super().__init__()
        self.weight, self.how = nn.Parameter(torch.ones(4)), how

    def forward(self, x, scale=1.0):
        return self.how(x, self.weight) * scale


class Layer(nn.Module):
    def __init__(self, how, around=lambda inner, x: x):
        super().__init__()
        self.inner, self.around = Scaled(how), around

    def forward(self, x, **kwargs):
        return self.inner(self.around(self.inner, x), **kwargs)


MIXTURE = Mixture((0, 0, 2), 5)
WEIGHTS = {n: {"inner.weight": torch.tensor([1.0, 2.0, 3.0, 4.0]) + n} for n in (0, 2)}
STATES = torch.arange(60.0).view(3, 5, 4)


def ran(how, x=STATES, around=lambda inner, x: x, **kwargs):
    """What a layer makes of x, and the shapes of the weight with which it was called."""
    seen = []
    layer = Layer(lambda x, weight: seen.append(weight.shape) or how(x, weight), around)
    block = Block(layer, "layer", {"inner.weight": "w"}, [], lambda names: {}, lambda *a: None)
    before = layer.inner.weight
    try:
        mixer = Mixer()
        mixer.run_each(block, WEIGHTS, MIXTURE, [((x,), kwargs)])
        seen.clear()  # the first time it tries
        return mixer.run_each(block, WEIGHTS, MIXTURE, [((x,), kwargs)])[0], seen
    finally:
        assert layer.inner.weight is before
        assert "forward" not in layer.inner.__dict__


def strict(x, weight):
    assert weight.shape == (4,)
    return x * weight


@pytest.mark.parametrize(
    "how, shapes",
    [
        (lambda x, w: w * x, [(3, 1, 4)]),
        (lambda x, w: x * (1.0 + w.float()).type_as(x), [(3, 1, 4)]),
        (lambda x, w: F.layer_norm(x, (4,), w), [(4,), (4,)]),
        (lambda x, w: x * w.flip(0), [(4,), (4,)]),  # would turn the rows round
        (lambda x, w: x @ torch.diag(w), [(4,), (4,)]),
        (strict, [(4,), (4,)]),
    ],
)
def test_a_weight_for_each_row_where_that_is_the_same(how, shapes):
    found, seen = ran(how)
    assert seen == [torch.Size(shape) for shape in shapes]
    assert torch.equal(found[:2], how(STATES[:2], WEIGHTS[0]["inner.weight"]))
    assert torch.equal(found[2:], how(STATES[2:], WEIGHTS[2]["inner.weight"]))


def test_what_all_rows_share_is_made_one_for_each():
    found, _ = ran(lambda x, w: w + x, STATES[:1])
    assert torch.equal(found[2] - found[0], torch.full((5, 4), 2.0))


@pytest.mark.parametrize(
    "x, kwargs",
    [
        (STATES.flatten(0, 1), {}),  # tokens, of whatever rows
        (STATES.transpose(0, 1), {}),  # positions first
        (STATES[:2], {}),
        (STATES[:, :4], {}),
        (STATES, {"scale": 2.0}),
    ],
)
def test_anything_else_is_not_followed(x, kwargs):
    with pytest.raises(NotMixedError):
        ran(lambda x, w: w * x, x, **kwargs)


def test_results_of_other_positions_are_not_followed():
    with pytest.raises(NotMixedError):
        ran(lambda x, w: F.layer_norm(x, (4,), w)[:, :2])


def test_others_may_ask_for_a_weight_but_not_compute_with_it():
    asked = []

    def ask(inner, x):
        weight = inner.weight
        asked.append((weight.shape, weight.dtype, weight.is_floating_point()))
        return x.to(weight.device, weight.dtype)

    found, _ = ran(lambda x, w: w * x, around=ask)
    assert asked[-1] == (torch.Size([4]), torch.float32, True)
    assert torch.equal(found[2], STATES[2] * WEIGHTS[2]["inner.weight"])
    for around in (lambda inner, x: x * inner.weight, lambda inner, x: x + inner.weight.sum()):
        with pytest.raises(NotMixedError, match="of a weight outside of its module"):
            ran(lambda x, w: w * x, around=around)


def test_a_forward_of_its_own_is_put_back():
    layer = Layer(lambda x, w: w * x)
    own = layer.inner.forward = functools.partial(Scaled.forward, layer.inner, scale=2.0)
    block = Block(layer, "layer", {"inner.weight": "w"}, [], lambda names: {}, lambda *a: None)
    (found,) = Mixer().run_each(block, WEIGHTS, MIXTURE, [((STATES,), {})])
    assert torch.equal(found[2], 2 * STATES[2] * WEIGHTS[2]["inner.weight"])
    assert layer.inner.forward is own


@pytest.mark.parametrize("dtype, noise", [(torch.bfloat16, 0.04), (torch.float32, 1e-4)])
@pytest.mark.parametrize("fault", [None, "rows", "nan"])
def test_the_trial_sees_faults_and_no_roundings(dtype, noise, fault):
    def states(passes):
        ids = torch.cat([ids for ids, _ in passes[:-1]])
        apart = torch.randn(3, 5, 64).clamp(-1, 1).to(dtype)
        together = apart + noise * torch.rand_like(apart)
        if fault == "rows":
            together = together[[1, 0, 2]]
        if fault == "nan":
            together[2, 4, 63] = torch.nan
        assert torch.equal(ids, passes[-1][0]) and len(ids.unique()) == 15
        return [apart[:1], apart[1:], together]

    assert agrees(states, 1000, torch.device("cpu")) == (fault is None)
