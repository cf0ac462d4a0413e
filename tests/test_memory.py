"""What a step takes, as it is predicted and as it is."""

from pathlib import Path

import pytest
import tiny
import transformers
from benchmarks.measuring import Live
from mergekit.options import MergeOptions

from mergekit_dam.config import Settings, read_recipe
from mergekit_dam.data import Row, SourceData
from mergekit_dam.fit.batches import batch
from mergekit_dam.fit.memory import Needs
from mergekit_dam.fit.objective import Distillation
from mergekit_dam.fit.place import choose_recompute
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.model.activations import Activations

QUIET = MergeOptions(quiet=True)
MODES = ("block", "weights", "none")
SOURCES = 2

SMALL = {**tiny.SIZES, "vocab_size": 512, "hidden_size": 128, "intermediate_size": 320}
# name -> config, tokens of a row
STEPS = {
    "activations": (transformers.LlamaConfig(**SMALL), 512),
    "weights": (transformers.LlamaConfig(**SMALL), 8),
    "depth": (transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 12}), 64),
    "vocabulary": (transformers.LlamaConfig(**{**SMALL, "vocab_size": 8192}), 128),
    "chunks": (transformers.LlamaConfig(**{**SMALL, "vocab_size": 70_000}), 600),
    "tied": (transformers.LlamaConfig(**SMALL, tie_word_embeddings=True), 128),
    "shared heads": (transformers.Qwen2Config(**{**SMALL, "num_key_value_heads": 1}), 256),
    "gemma3": (transformers.Gemma3TextConfig(**SMALL, head_dim=64), 128),
    "every pair of tokens": (transformers.Gemma2Config(**SMALL, head_dim=64), 400),  # eager
    "head": (transformers.LlamaConfig(**{**SMALL, "vocab_size": 32_000}), 8),
    "gpt2": (
        transformers.GPT2Config(
            vocab_size=512, n_embd=128, n_layer=2, n_head=2, n_positions=256, bos_token_id=1,
            eos_token_id=2,
        ),
        200,
    ),
}  # fmt: skip


def prepared(recipe, folder: Path, config, length: int, dam: dict):
    models = tiny.save_models(folder, config, SOURCES)
    rows = [Row([number + 1] * length) for number in range(SOURCES)]
    data = [SourceData([row], [row]) for row in rows]
    path = recipe(models, dam={"batch_size": 1, **dam})
    found = prepare(read_recipe(str(path)), QUIET, device="cpu", data=data)
    step = Distillation(found.merged, found.settings.objective)
    inputs = batch(rows, list(range(SOURCES)))

    def run() -> None:
        step(**inputs)["loss"].backward()
        step.zero_grad()

    return found, run


def compare(recipe, folder: Path, name: str, dam: dict) -> None:
    """Within 15 %, counted tensor by tensor."""
    config, length = STEPS[name]
    found, step = prepared(recipe, folder, config, length, dam)
    for mode in MODES:
        found.merged.recompute = mode
        step()
        with Live() as live:
            step()
        assert found.needs.of(mode) == pytest.approx(live.most, rel=0.15), mode


@pytest.mark.parametrize("name", STEPS)
def test_a_step_takes_what_was_predicted(recipe, tmp_path, name):
    compare(recipe, tmp_path, name, {})


@pytest.mark.parametrize(
    "terms", ["jsd", "mse", "entropy", "kl jsd", "kl entropy", "kl mse", "kl reverse_kl mse"]
)
def test_so_do_other_terms(recipe, tmp_path, terms):
    compare(
        recipe, tmp_path, "vocabulary", {"objective": {"kl": 0, **dict.fromkeys(terms.split(), 1)}}
    )


@pytest.mark.parametrize(
    "free, mode", [(10**6, "none"), (40_000, "weights"), (12_000, "block"), (1, "block")]
)
def test_auto_takes_the_fastest_that_fits(free, mode):
    kept = Activations(all=1000, largest=200, inputs=50, widest=20)
    needs = Needs(tokens=10, kept=kept, states=100, blocks=50_000, block=1000, matrix=300)
    settings = Settings(data=())
    chosen, why = choose_recompute(settings, needs, free)
    assert chosen == mode
    assert f"recompute: {mode}, with about" in why
    settings = Settings(data=(), recompute="weights")
    assert choose_recompute(settings, needs, free) == ("weights", "")
