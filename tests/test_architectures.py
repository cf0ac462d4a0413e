"""Each line of the table of architectures, by a fit, a stock merge and a strict load."""

import copy
from dataclasses import replace
from pathlib import Path

import architectures
import pytest
import tiny
import torch
import transformers
import yaml
from architectures import FITTED, NOT_CAUSAL, OWN_CODE, REFUSED, SEEING, Architecture
from commands import refusal, run
from compatibility import shows
from mergekit.architecture.json_definitions import NAME_TO_ARCH
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import PretrainedConfig
from transformers.core_model_loading import MergeModulelist

from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.config import read_recipe
from mergekit_dam.errors import DamError
from mergekit_dam.fit.prepare import Fit, prepare
from mergekit_dam.model import MergedModel, build_skeleton
from mergekit_dam.model.live import Live

QUIET = MergeOptions(quiet=True)


def by_name(architecture: Architecture) -> str:
    return architecture.name


def save(architecture: Architecture, tmp_path: Path) -> list[Path]:
    return [architecture.save(tmp_path / f"m{seed}", seed) for seed in range(2)]


def prepared(path: Path) -> Fit:
    return prepare(read_recipe(str(path)), QUIET, device="cpu")


@pytest.mark.parametrize("architecture", FITTED, ids=by_name)
def test_fit_merge_and_strict_load(architecture, recipe, tmp_path, caplog):
    models = save(architecture, tmp_path)
    path = recipe(models, dam={"steps": 2})
    run("mergekit-dam", "fit", path, "--quiet", "--device", "cpu")
    merged = prepared(path).merged
    assert "cannot be measured" not in caplog.text  # what it takes
    file, ids = CoefficientFile(tmp_path / "dam.safetensors"), tiny.tokens()
    unchanged = {n for n, c in merged.coefficients().items() if torch.equal(file.get(n), c)}
    assert unchanged == expected_untrained(architecture, file.names)
    with torch.no_grad():
        for name, coefficient in merged.coefficients().items():
            coefficient.copy_(file.get(name))
        logits, teacher = merged(ids), tiny.teach(merged, 1, ids)
        run("mergekit-yaml", path, tmp_path / "out", "--quiet")
        result = architectures.load(tmp_path / "out", architecture.name)(ids).logits
        source = architectures.load(models[1], architecture.name)(ids).logits
    torch.testing.assert_close(logits, result)
    torch.testing.assert_close(teacher, source)
    assert_nothing_stays(merged, ids)


def assert_nothing_stays(merged: MergedModel, ids: torch.Tensor) -> None:
    """Of a step, that the next would find: autograd's results that hold themselves, say."""
    for merged.recompute in ("block", "weights", "none"):
        with Live() as live:
            merged(ids).sum().backward()
            merged.zero_grad()
        assert live.now == 0, merged.recompute


def expected_untrained(architecture: Architecture, names) -> set[str]:
    found = {part: {name for name in names if part in name} for part in architecture.untrained}
    assert all(found.values())
    return set().union(*found.values())


def test_what_no_text_reaches_takes_no_memory_of_a_step(recipe, tmp_path):
    """A large vision tower beside a small decoder."""
    (gemma,) = (one for one in SEEING if one.name == "Gemma3ForConditionalGeneration")
    large = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
    sizes = {**gemma.sizes, "vision_config": {**gemma.sizes["vision_config"], **large}}
    needs = [prepared(recipe(save(one, tmp_path / name))).needs for name, one in (
        ("small", gemma), ("large", replace(gemma, sizes=sizes))
    )]  # fmt: skip
    assert needs[0] == needs[1]


@shows(
    "settings",
    "tensors that no text reaches (vision)",
    "keep the start: the plain average, none lost",
)
def test_a_vision_tower_is_averaged_and_none_of_it_is_lost(recipe, tmp_path):
    architecture = SEEING[0]
    models = save(architecture, tmp_path)
    path = recipe(models, dam={"steps": 2})
    run("mergekit-dam", "run", path, tmp_path / "out", "--quiet")
    sources = [load_file(folder / "model.safetensors") for folder in models]
    merged = load_file(tmp_path / "out" / "model.safetensors")
    file = CoefficientFile(tmp_path / "dam.safetensors")
    assert merged.keys() == sources[0].keys() == file.names
    seeing = expected_untrained(architecture, merged)
    assert len(seeing) > 20
    for name in seeing:
        assert (file.get(name) == 0.5).all()
        torch.testing.assert_close(merged[name], (sources[0][name] + sources[1][name]) / 2)


@shows(
    "settings",
    "`weight` by filter for them",
    "the rule by which they are merged: `weight: [{filter: visual, value: 1.0}, {value: 0.5}]`",
)
def test_the_config_states_the_rule_for_the_vision_part(recipe, tmp_path):
    """Weights by filter: all of the first model's sight, and the average elsewhere."""
    architecture = SEEING[0]
    models = save(architecture, tmp_path)
    path = recipe(models, dam={"steps": 2})
    document = yaml.safe_load(path.read_text())
    for model, share in zip(document["models"], (1.0, 0.0), strict=True):
        rules = [{"filter": part, "value": share} for part in architecture.untrained]
        model["parameters"] = {"weight": [*rules, {"value": 0.5}]}
    path.write_text(yaml.safe_dump(document))
    run("mergekit-dam", "run", path, tmp_path / "out", "--quiet")
    first = load_file(models[0] / "model.safetensors")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name in expected_untrained(architecture, merged):
        assert torch.equal(merged[name], first[name]), name


def in_modules(path: Path, modules: list[str]) -> Path:
    """The same recipe with its models under each of these modules."""
    document = yaml.safe_load(path.read_text())
    models = document.pop("models")
    document["modules"] = {name: {"models": copy.deepcopy(models)} for name in modules}
    path.write_text(yaml.safe_dump(document))
    return path


@shows("settings", "`modules` of a model that sees", "all of them; the same bytes as `models`")
def test_modules_of_a_model_with_several_parts(recipe, tmp_path):
    architecture = SEEING[0]
    models = save(architecture, tmp_path)
    keys = {"dam": {"steps": 2}, "base_model": str(models[0])}
    run("mergekit-dam", "run", recipe(models, **keys), tmp_path / "models", "--quiet")
    modules = list(NAME_TO_ARCH[architecture.name][0].modules)
    assert len(modules) > 1
    path = in_modules(recipe(models, **keys), modules)
    run("mergekit-dam", "run", path, tmp_path / "modules", "--quiet")
    run("mergekit-yaml", path, tmp_path / "stock", "--quiet")
    architectures.load(tmp_path / "stock", architecture.name)
    first, *others = (
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("models", "modules", "stock")
    )
    assert others == [first, first]
    lacking = refusal("mergekit-dam", "check", in_modules(recipe(models, **keys), modules[:1]))
    assert f"`modules` lacks {' and '.join(modules[1:])}, without" in lacking
    message = refusal("mergekit-dam", "check", in_modules(recipe(models, **keys), ["txt"]))
    assert "`modules.txt` is no module of" in message


def test_gradients_reach_experts_that_are_stacked_on_the_way(recipe, tmp_path):
    """The checkpoint has a tensor for each expert, the model one for them all."""
    (architecture,) = (a for a in FITTED if a.name == "AfmoeForCausalLM")
    models = save(architecture, tmp_path)
    merged, ids = prepared(recipe(models)).merged, tiny.tokens()
    sources = [load_file(folder / "model.safetensors") for folder in models]
    torch.manual_seed(0)
    with torch.no_grad():
        for coefficient in merged.parameters():
            coefficient.copy_(torch.rand_like(coefficient))
    leaves = {n: c.detach().clone().requires_grad_() for n, c in merged.coefficients().items()}
    weights = {n: sum(leaves[n][i] * s[n] for i, s in enumerate(sources)) for n in leaves}
    skeleton = architectures.load(models[0], architecture.name)
    for layer in {n.partition(".experts.")[0] for n in weights if ".experts." in n}:
        gate, up, down = (
            torch.stack([weights.pop(f"{layer}.experts.{e}.{kind}_proj.weight") for e in range(4)])
            for kind in ("gate", "up", "down")
        )
        weights[f"{layer}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        weights[f"{layer}.experts.down_proj"] = down
    expected = functional_call(skeleton, weights, (ids,)).logits
    direction = torch.randn_like(expected)
    (expected * direction).sum().backward()
    logits = merged(ids)
    (logits * direction).sum().backward()
    torch.testing.assert_close(logits, expected)
    for name, coefficient in merged.trained_coefficients().items():
        gradient = leaves[name].grad
        assert (coefficient.grad - gradient).abs().max() <= 2e-5 * gradient.abs().max(), name


def test_columns_of_stacked_and_of_transposed_experts_are_their_inputs(recipe, tmp_path):
    shapes = {}
    for name in ("AfmoeForCausalLM", "GptOssForCausalLM"):
        (architecture,) = (a for a in FITTED if a.name == name)
        merged = prepared(recipe(save(architecture, tmp_path / name))).merged
        shapes |= {n: tuple(c.shape) for n, c in merged.coefficients().items()}
    assert shapes["model.layers.1.mlp.experts.0.up_proj.weight"] == (2, 1, 16)
    assert shapes["model.layers.1.mlp.experts.0.down_proj.weight"] == (2, 1, 12)
    assert shapes["model.layers.0.mlp.experts.gate_up_proj"] == (2, 4, 16, 1)  # [4, in, out]


def test_a_weight_that_nobody_gives_is_no_number_and_takes_no_memory(recipe, tmp_path):
    """Models ask a weight for its device and shape; its value must never be used."""
    model = prepared(recipe(save(FITTED[0], tmp_path))).merged.model
    for place in model.parameters():
        assert place.isnan().all()
        assert place.device.type == "cpu"
        assert place.untyped_storage().nbytes() == place.element_size()


@pytest.mark.parametrize("architecture", REFUSED, ids=by_name)
def test_what_cannot_be_fitted_is_refused(architecture, recipe, tmp_path):
    path = recipe(save(architecture, tmp_path))
    message = refusal("mergekit-dam", "fit", path)
    assert architecture.reason in message


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_what_is_no_causal_language_model_is_refused_by_name(name):
    assert name in NAME_TO_ARCH
    config = getattr(transformers, NOT_CAUSAL[name])(architectures=[name])
    with pytest.raises(DamError, match=f"{name} is not a causal language model"):
        build_skeleton(config, ())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_sees_later_tokens_is_refused(recipe, tmp_path, dtype):
    """A class and a config that say nothing of it."""
    (bert,) = (one for one in FITTED if one.name == "BertLMHeadModel")
    models = save(replace(bert, sizes={**bert.sizes, "is_decoder": False}), tmp_path)
    path = recipe(models, dam={"compute_dtype": dtype})
    said = refusal("mergekit-dam", "fit", path, "--quiet", "--device", "cpu")
    assert "BertLMHeadModel with this config.json sees later tokens" in said
    assert not list(tmp_path.glob("dam.safetensors*"))


@pytest.mark.parametrize("name", OWN_CODE)
def test_classes_that_transformers_lacks_are_refused_by_name(name):
    assert name in NAME_TO_ARCH
    with pytest.raises(DamError, match=name):
        build_skeleton(PretrainedConfig(architectures=[name]), ())


def test_a_conversion_without_a_gradient_is_refused_by_name(recipe, tmp_path, monkeypatch):
    (architecture,) = (a for a in FITTED if a.name == "AfmoeForCausalLM")
    path = recipe(save(architecture, tmp_path))
    convert = MergeModulelist.convert
    monkeypatch.setattr(
        MergeModulelist,
        "convert",
        lambda *args, **keys: {k: v.detach() for k, v in convert(*args, **keys).items()},
    )
    with pytest.raises(DamError, match=r"experts\.down_proj"):
        prepared(path)


def test_every_causal_architecture_that_mergekit_describes_has_its_line():
    lines = {a.name for a in (*FITTED, *REFUSED)} | set(OWN_CODE)
    other = ("Bert", "DistilBert", "Roberta", "T5", "Whisper", "_Afmoe", "LLaMa")  # an old name
    missing = {n for n in NAME_TO_ARCH if n not in lines and not n.startswith(other)}
    assert not {n for n in missing if "Classification" not in n}
