"""Sources whose config is not the merge's: each teaches as itself."""

from pathlib import Path

import pytest
import tiny
import torch
import transformers
import yaml
from commands import refusal, run
from compatibility import shows
from mergekit.options import MergeOptions

from mergekit_dam.config import read_recipe
from mergekit_dam.fit.prepare import prepare

ROPE = {"rope_type": "default", "rope_theta": 20.0}
OTHERS = {
    "rope": {"rope_parameters": ROPE},
    "activation": {"hidden_act": "gelu"},
    "epsilon": {"rms_norm_eps": 0.5},
    "heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4},
    "tie": {"tie_word_embeddings": True},
}


def models(folder: Path, other: dict) -> list[Path]:
    sizes = {**tiny.SIZES, "head_dim": 8}
    configs = [transformers.LlamaConfig(**{**sizes, **own}) for own in ({}, other)]
    return [tiny.save_model(folder / f"m{n}", config, n) for n, config in enumerate(configs)]


@shows(
    "settings",
    "sources with another config (rotary base, activation, heads, tied head), with a `base_model`",
    "each teaches as itself",
)
@pytest.mark.parametrize("key", OTHERS)
@pytest.mark.parametrize("base", [0, 1])
def test_a_teacher_has_its_own_config(recipe, tmp_path, key, base):
    both = models(tmp_path, OTHERS[key])
    path = recipe(both, base_model=str(both[base]))
    merged = prepare(read_recipe(str(path)), MergeOptions(quiet=True), device="cpu").merged
    ids = tiny.tokens()
    for number, folder in enumerate(both):
        torch.testing.assert_close(tiny.teach(merged, number, ids), tiny.load(folder)(ids).logits)


def test_without_a_base_the_config_would_be_a_matter_of_luck(recipe, tmp_path):
    message = refusal("mergekit-dam", "fit", recipe(models(tmp_path, OTHERS["rope"])))
    assert "rope_theta" in message
    assert "base_model" in message


@shows("settings", "`modules`", "the same bytes as `models`")
def test_modules_of_a_config(recipe, tmp_path):
    both = models(tmp_path, {})
    path = recipe(both)
    run("mergekit-dam", "run", path, tmp_path / "models", "--quiet")
    document = yaml.safe_load(path.read_text())
    document["modules"] = {"default": {"models": document.pop("models")}}
    path.write_text(yaml.safe_dump(document))
    run("mergekit-dam", "run", path, tmp_path / "modules", "--quiet")
    run("mergekit-yaml", path, tmp_path / "stock", "--quiet")
    first, second, third = (
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("models", "modules", "stock")
    )
    assert first == second == third


@shows("settings", "`chat_template`", "as mergekit writes it")
def test_chat_templates(recipe, tmp_path):
    both = models(tmp_path, {})
    path = recipe(both, base_model=str(both[0]), chat_template="chatml")
    run("mergekit-dam", "run", path, tmp_path / "out", "--quiet")
    template = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert "<|im_start|>" in template
    path = recipe(both, base_model=str(both[0]), chat_template="nonsense")
    assert "nonsense" in refusal("mergekit-dam", "check", path)


def test_a_source_with_nan_is_named(recipe, tmp_path):
    from safetensors.torch import load_file, save_file

    both = models(tmp_path, {})
    file = both[1] / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    message = refusal("mergekit-dam", "fit", recipe(both))
    assert str(both[1]) in message
    assert "model.norm.weight" in message


def test_files_beside_the_checkpoints_are_kept(recipe, tmp_path):
    both = models(tmp_path, {})
    folder = tmp_path / "dam.safetensors.fit"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    assert str(folder) in refusal("mergekit-dam", "fit", recipe(both))
    assert (folder / "mine").read_text() == "mine"
