"""What a model keeps is measured without computing."""

import copy
import gc

import pytest
import tiny
import torch
import transformers
from commands import run
from mergekit.options import MergeOptions
from torch._subclasses.fake_tensor import FakeTensor

from mergekit_dam.config import read_recipe
from mergekit_dam.data import Row, SourceData
from mergekit_dam.fit.forecast import Outline, merged_skeleton
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.headers import HeaderShapes
from mergekit_dam.least_squares import memory
from mergekit_dam.model import activations
from mergekit_dam.model.activations import measure
from mergekit_dam.plan import plan_merge

QUIET = MergeOptions(quiet=True)


def test_what_a_model_keeps_is_measured_without_computing():
    config = transformers.LlamaConfig(
        **{**tiny.SIZES, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    )
    predicted = measure(config, torch.float32, [64], trust_remote_code=False)[64]
    model = transformers.LlamaForCausalLM(config)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(input_ids=torch.ones(2, 32, dtype=torch.long), use_cache=False)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 64
    assert predicted.all == pytest.approx(real, rel=0.15)
    assert predicted.largest == pytest.approx(real / 3, rel=0.15)
    states, positions = 3 * 128 * 4, 2 * 64 * 4  # cosines and sines
    assert predicted.inputs == pytest.approx(states + positions, rel=0.01)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_architecture_is_measured(name, caplog):
    found = measure(tiny.CONFIGS[name], torch.float32, [64], trust_remote_code=False)[64]
    assert found.all >= found.largest >= found.inputs / 6 > 0
    assert found.most >= found.passing >= found.passed > 0
    assert "cannot be measured" not in caplog.text


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_nothing_of_it_stays(name):
    """What autograd holds and what this holds would keep each other."""

    def measured() -> int:
        measure(tiny.CONFIGS[name], torch.float32, [64], trust_remote_code=False)
        gc.collect()
        return sum(type(thing) is FakeTensor for thing in gc.get_objects())

    assert measured() == measured()


WINDOW = 120
MIXERS = {"mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}


@pytest.mark.parametrize(
    "config, lengths, how",
    [
        (transformers.LlamaConfig(**tiny.SIZES), (8, 500), "the same"),
        (transformers.Gemma2Config(**tiny.SIZES, head_dim=8), (8, 500), "more"),  # eager
        (
            transformers.Gemma3TextConfig(**tiny.SIZES, head_dim=8, sliding_window=WINDOW),
            (8, WINDOW - 1),
            "the same",
        ),
        (
            transformers.Gemma3TextConfig(**tiny.SIZES, head_dim=8, sliding_window=WINDOW),
            (WINDOW, 2 * WINDOW),
            "more",
        ),
        (
            transformers.GraniteMoeHybridConfig(
                **tiny.SIZES, **MIXERS, mamba_expand=2, layer_types=["mamba", "attention"],
                mamba_chunk_size=128, num_local_experts=2, num_experts_per_tok=1,
            ),
            (32, 128),
            "less",  # shorter rows are filled up
        ),
    ],
)  # fmt: skip
def test_a_token_of_a_longer_row_keeps(config, lengths, how):
    found = measure(config, torch.float32, lengths, trust_remote_code=False)
    short, long = (found[length].all for length in lengths)
    assert how == ("the same" if short == long else "more" if short < long else "less")


LATENT = transformers.DeepseekV3Config(  # keys of 24 numbers, values of 16
    **{**tiny.SIZES, "num_key_value_heads": 2}, q_lora_rank=None, kv_lora_rank=8,
    qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=4, n_group=2,
    topk_group=1, num_experts_per_tok=2, moe_intermediate_size=8, first_k_dense_replace=0,
)  # fmt: skip


@pytest.mark.parametrize("device, how", [("cpu", "more"), ("cuda", "the same")])
def test_attention_to_narrow_values_keeps_pairs_of_tokens_on_a_cpu_alone(device, how):
    found = measure(LATENT, torch.float32, (8, 500), trust_remote_code=False, device=device)
    short, long = found[8].all, found[500].all
    assert how == ("the same" if short == long else "more" if short < long else "less")


def test_narrow_values_are_kept_as_they_are_on_a_gpu():
    alike = copy.deepcopy(LATENT)
    alike.v_head_dim = 24  # as wide as keys: their kernel is fused on a CPU, too
    narrow = measure(LATENT, torch.float32, (500,), trust_remote_code=False, device="cuda")[500]
    wide = measure(alike, torch.float32, (500,), trust_remote_code=False)[500]
    more = LATENT.num_hidden_layers * LATENT.num_attention_heads * 8 * 4
    assert wide.all - narrow.all == 3 * more  # of values, what they are split from, and the result


def test_nor_does_the_start_make_them_there(recipe, tmp_path):
    models = tiny.save_models(tmp_path, LATENT, 2)
    dam = {"start": "least_squares", "max_length": 500}
    settings = read_recipe(str(recipe(models, dam=dam)))
    plan = plan_merge(settings.merge, QUIET, "weights")
    shapes, rows = HeaderShapes(plan), [Row([4] * 500)] * 4
    skeleton = merged_skeleton(plan, shapes)
    own, other = (
        Outline(plan, shapes, skeleton, device, [SourceData(rows, [])] * 2)._of_start(
            settings.settings, torch.float32, skeleton.roles, {"lm_head.weight": 32}
        )
        for device in ("cpu", "cuda")
    )
    assert other.most < own.most


def test_outputs_have_gradients_where_they_are_passed_on_with_some():
    x = torch.ones(2, 4, requires_grad=True)
    block, following = torch.nn.Identity(), torch.nn.Identity()
    made, dropped, places = 2 * x, 3 * x, torch.ones(2)
    for given, passed_on in (
        ((made, places), {0}),
        ((made + x, places), {0, 2}),  # something that was made of them
        ((made, dropped), {0, 2}),
    ):
        kept = activations._Kept(block)
        kept.before(block, (x,), {})
        kept.after(block, (x,), {}, (made, places, dropped, x))
        kept.before(following, given, {})
        assert kept.passed_on(block) == passed_on


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_other_attention_keeps_the_same_on_a_gpu(name):
    own, other = (
        measure(tiny.CONFIGS[name], torch.float32, (60,), trust_remote_code=False, device=device)
        for device in ("cpu", "cuda")
    )
    assert own == other


def test_rows_of_any_length_are_measured_once_where_they_keep_the_same(monkeypatch):
    seen, kept = [], activations._kept

    def recorded(model, tokens):
        seen.append(tokens)
        return kept(model, tokens)

    monkeypatch.setattr(activations, "_kept", recorded)
    config, lengths = transformers.LlamaConfig(**tiny.SIZES), range(1, 300)
    found = measure(config, torch.float32, lengths, trust_remote_code=False)
    assert set(found) == set(lengths)
    assert tuple(seen) == activations.TOKENS


def test_what_cannot_be_measured_is_estimated_and_told(recipe, tmp_path, monkeypatch, caplog):
    def cannot(*_args):
        raise RuntimeError("no such operation.")

    monkeypatch.setattr(activations, "_run", cannot)
    monkeypatch.setattr(memory, "_pass", cannot)
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    path = recipe(models, dam={"start": "least_squares"})
    found = prepare(read_recipe(str(path)), QUIET, device="cpu")
    assert found.needs.of("block") > 0 and found.place.start > 0
    told = [message for message in caplog.messages if "cannot be measured" in message]
    assert told == [
        f"What {what} of this model takes in memory cannot be measured beforehand, so it is "
        "estimated, like that of a Llama of its sizes (no such operation)."
        for what in ("a step", "the start")
    ]


def test_nobody_is_told_what_torch_says_of_tensors_without_storage(recipe, tmp_path):
    models = tiny.save_models(tmp_path, tiny.CONFIGS["mixtral"], 2)
    assert "fake_tensor" not in run("mergekit-dam", "check", recipe(models)).stderr
