"""The loss over chunks of tokens against the loss over all logits at once."""

import weakref

import pytest
import tiny
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from mergekit.options import MergeOptions

from mergekit_dam.config import read_recipe
from mergekit_dam.config.settings import Objective
from mergekit_dam.data import Row
from mergekit_dam.fit import chunks
from mergekit_dam.fit.batches import batch
from mergekit_dam.fit.evaluate import evaluate
from mergekit_dam.fit.objective import LOSSES, Distillation
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.model import Block
from mergekit_dam.model.split import Split

CONFIGS = {
    **{name: tiny.CONFIGS[name] for name in ("llama", "llama_tied", "gemma2", "gpt2", "mixtral")},
    "granite": transformers.GraniteConfig(**tiny.SIZES, logits_scaling=7.0),
    "cohere2": transformers.Cohere2Config(**tiny.SIZES, logit_scale=0.3),
    "opt": transformers.OPTConfig(**tiny.SIZES, ffn_dim=24, word_embed_proj_dim=16),
}
OBJECTIVE = Objective(kl=1, reverse_kl=0.5, jsd=0.4, mse=0.3, entropy=0.2, temperature=1.5)
ROWS = [
    Row([1, 5, 6, 7]),
    Row([1, 9, 8, 20, 21, 22], start=2),
    Row([1, 4, 4, 12, 13, 14, 30, 31, 32], start=3),
    Row([1, 2]),
]
SOURCES = [0, 0, 1, 1]


@pytest.fixture
def make(recipe, tmp_path):
    def make(name: str, **dam):
        models = tiny.save_models(tmp_path, CONFIGS[name], 2)
        path = str(recipe(models, dam=dam))
        return prepare(read_recipe(path), MergeOptions(quiet=True), device="cpu")

    return make


@pytest.fixture
def in_small_chunks(monkeypatch):
    """Which sources share, in pieces of which the terms are made."""
    monkeypatch.setattr(chunks, "CHUNK", 3 * tiny.VOCABULARY)
    monkeypatch.setattr(chunks, "PIECES", {"cpu": 2 * tiny.VOCABULARY})


def whole(merged, inputs) -> torch.Tensor:
    """The distilling part of the loss from all logits at once."""
    ids, lengths, sources = inputs["input_ids"], inputs["lengths"], inputs["sources"]
    logits, loss = merged(ids), 0
    for source in (0, 1):
        positions = torch.arange(ids.shape[1])
        mask = (positions >= inputs["starts"][:, None]) & (positions < lengths[:, None] - 1)
        mask &= (sources == source)[:, None]
        teacher = tiny.teach(merged, source, ids)[mask]
        for name, compare in LOSSES.items():
            term = compare(logits[mask], teacher, OBJECTIVE.temperature)
            loss = loss + getattr(OBJECTIVE, name) * term
    return loss


def gradients(merged, loss) -> dict[str, torch.Tensor]:
    merged.zero_grad()
    loss.backward()
    return {name: c.grad.clone() for name, c in merged.coefficients().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_equal_the_loss_of_all_logits(make, name, in_small_chunks):
    merged, inputs = make(name).merged, batch(ROWS, SOURCES)
    torch.manual_seed(0)
    with torch.no_grad():
        for coefficient in merged.parameters():
            coefficient.copy_(torch.rand_like(coefficient))
    expected = whole(merged, inputs)
    objective = OBJECTIVE.model_copy(update={"similarity": 0.0})
    found = Distillation(merged, objective)(**inputs)["loss"]
    assert not merged._split.is_whole
    torch.testing.assert_close(found, expected)
    plain = gradients(merged, expected)
    most = max(gradient.abs().max() for gradient in plain.values())
    for tensor, gradient in gradients(merged, 3 * found).items():
        bound = 6e-5 * plain[tensor].abs().max()
        if name == "opt" and tensor.endswith("k_proj.bias"):  # zero but for roundings
            bound = 1e-6 * most
        assert (gradient / 3 - plain[tensor]).abs().max() <= bound, tensor


@given(st.integers(0, 5000), st.integers(1, 300), st.integers(1, 1000))
def test_slices_have_all_tokens_and_no_more_numbers_than_they_may(tokens, vocabulary, numbers):
    found = [range(tokens)[part] for part in chunks.slices(tokens, vocabulary, numbers)]
    assert [token for part in found for token in part] == list(range(tokens))
    sizes = sorted(map(len, found))
    assert not sizes or sizes[-1] == 1 or sizes[-1] * vocabulary <= numbers
    assert len(found) <= 1 or len(found) == -(-tokens // sizes[-1])


@pytest.mark.parametrize("outer", [1 / 3, 0.7])
def test_a_factor_of_the_loss_is_not_rounded_with_its_gradients(outer):
    """As accumulation has it; in 16 bits a third is 1.002 thirds."""
    gradient = torch.rand(1000).bfloat16()
    value, states = torch.tensor(1.0), torch.zeros(1000, dtype=torch.bfloat16, requires_grad=True)
    (outer * chunks._Known.apply(value, states, gradient.clone())).backward()
    assert torch.equal(states.grad, (outer * gradient.float()).bfloat16())


def test_only_predicted_positions_reach_the_head_a_few_at_a_time(
    make, watch, in_small_chunks, monkeypatch
):
    fit, seen = make("llama"), []
    merged, run_with = fit.merged, Block.run_with
    distil = Distillation(merged, Objective())
    distil(**batch(ROWS, SOURCES))  # finds out how the model is split

    def counting(block, weights, *args, **kwargs):
        if block.path == "lm_head":
            seen.append(args[0].shape[1])
        return run_with(block, weights, *args, **kwargs)

    monkeypatch.setattr(Block, "run_with", counting)
    made = watch(merged)
    distil(**batch(ROWS, SOURCES))["loss"].backward()
    assert max(seen) <= 3
    assert sum(seen) == 2 * sum(
        len(row) - 1 - row.start for row in ROWS
    )  # the merge and the teachers
    assert made.count(("lm_head.weight", None)) == 1
    with torch.no_grad():
        seen.clear()
        evaluate(merged, [source.held_out for source in fit.data], 60, 30)
    assert max(seen) <= 3


def test_one_sources_head_is_there_at_a_time(make, in_small_chunks, monkeypatch):
    """Where the passes are in another dtype, a head is a copy of the vocabulary's size."""
    merged, alive, most = make("llama").merged, [], []
    distil = Distillation(merged, Objective())
    head = merged.head

    def counting(view=None):
        if view is not None:
            most.append(sum(reference() is not None for reference in alive))
        made = head(view)
        if view is not None:
            alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(merged, "head", counting)
    distil(**batch(ROWS, SOURCES))["loss"].backward()
    assert most == [0, 0]  # once for each source, though chunks go through both
    assert not any(reference() for reference in alive)


def test_one_chunks_gradients_are_there_at_a_time(make, in_small_chunks, monkeypatch):
    """Beside their sum, as large as the head."""
    merged, alive, most = make("llama", compute_dtype="bfloat16").merged, [], []
    of_chunk = chunks.ChunkedLoss._chunk

    def counting(self, *args):
        most.append(sum(reference() is not None for reference in alive))
        found = of_chunk(self, *args)
        alive.extend(map(weakref.ref, found))
        return found

    monkeypatch.setattr(chunks.ChunkedLoss, "_chunk", counting)
    Distillation(merged, Objective())(**batch(ROWS, SOURCES))
    assert len(most) > 2
    assert not any(most)


def test_held_out_figures_do_not_depend_on_the_chunks(make, monkeypatch):
    fit = make("gemma2")
    rows = [source.held_out for source in fit.data]
    whole = evaluate(fit.merged, rows, 60, 30)
    monkeypatch.setattr(chunks, "CHUNK", 4 * tiny.VOCABULARY)
    monkeypatch.setattr(chunks, "PIECES", {"cpu": 3 * tiny.VOCABULARY})
    for one, other in zip(whole, evaluate(fit.merged, rows, 60, 30), strict=True):
        assert one.tokens == other.tokens
        assert one.kl == pytest.approx(other.kl, rel=1e-5)
        assert one.source_perplexity == pytest.approx(other.source_perplexity, rel=1e-5)


def test_frozen_heads_and_frozen_bodies(make, in_small_chunks):
    """Where only one side of the states is trained, the other gets no gradient and costs none."""
    merged, inputs = make("llama").merged, batch(ROWS, SOURCES)
    plain = gradients(merged, Distillation(merged, OBJECTIVE)(**inputs)["loss"])
    for trained in (["lm_head.weight"], ["model.layers.0.mlp.up_proj.weight"]):
        merged.zero_grad()
        for tensor, coefficient in merged.coefficients().items():
            coefficient.requires_grad_(tensor in trained)
        Distillation(merged, OBJECTIVE)(**inputs)["loss"].backward()
        for tensor, coefficient in merged.coefficients().items():
            assert (coefficient.grad is not None) == (tensor in trained)
        # The similarity of all tensors is a mean over the trained ones.
        (name,) = trained
        torch.testing.assert_close(merged.coefficients()[name].grad, plain[name])


class Neighbours(transformers.LlamaForCausalLM):
    """Its logits at a position are made of other positions, too."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits.cumsum(1)
        return outputs


class Demanding(transformers.LlamaForCausalLM):
    """Asks its inner model for more than states."""

    def forward(self, input_ids, **kwargs):
        inner = self.model(input_ids, output_hidden_states=True, **kwargs)
        logits = self.lm_head(inner.last_hidden_state) * len(inner.hidden_states)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


@pytest.mark.parametrize("kind", [Neighbours, Demanding])
def test_a_model_that_cannot_be_split_is_left_whole(kind):
    torch.manual_seed(0)
    model, ids = kind(CONFIGS["llama"]).eval(), tiny.tokens()
    split = Split(model)
    with torch.no_grad():
        states = split.states(ids)
        torch.testing.assert_close(split.logits(states[0]), model(ids).logits[0])
    assert not any(split.in_head(module) for module in model.modules())
