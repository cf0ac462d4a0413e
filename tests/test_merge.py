"""Merging with mergekit's own unmodified commands."""

import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from commands import kill_when, refusal, run
from compatibility import shows
from mergekit.evo.genome import METHOD_PARAM_MAPS, ModelGenomeDefinition
from mergekit.merge import run_merge
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from mergekit_dam.coefficients import CoefficientFile, save
from mergekit_dam.config import read_recipe
from mergekit_dam.fit import fit
from mergekit_dam.fit.evaluate import evaluate
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.output import appearing
from mergekit_dam.plan import plan_merge

QUIET = MergeOptions(quiet=True)
FLAGS = (
    ("--lazy-unpickle", "--async-write", "--write-threads", "2"),
    ("--low-cpu-memory", "--read-to-gpu", "--clone-tensors"),
    ("--out-shard-size", "1K"),
)
GPU_FLAGS = (("--cuda",), ("--multi-gpu", "--cuda"), ("--gpu-rich",))


def named(flags: Sequence[Sequence[str]]) -> str:
    single = dict.fromkeys(flag for some in flags for flag in some if flag.startswith("-"))
    return ", ".join(f"`{flag}`" for flag in single)


def fitted(path: Path, tmp_path: Path) -> torch.Tensor:
    """Fit a recipe and return the fit's own merged logits."""
    recipe = read_recipe(str(path))
    fit(recipe, recipe.coefficients, QUIET, device="cpu")
    merged = prepare(recipe, QUIET, device="cpu").merged
    file = CoefficientFile(recipe.coefficients)
    with torch.no_grad():
        for name, coefficient in merged.coefficients().items():
            coefficient.copy_(file.get(name))
        return merged(tiny.tokens())


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_logits_equal_the_fits(recipe, tmp_path, architecture, dtype):
    models = tiny.save_models(tmp_path, tiny.CONFIGS[architecture], 3, getattr(torch, dtype))
    path = recipe(models, dtype=dtype)
    logits = fitted(path, tmp_path)
    run("mergekit-yaml", path, tmp_path / "out", "--quiet")
    torch.testing.assert_close(tiny.load(tmp_path / "out")(tiny.tokens()).logits, logits)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    return tiny.save_models(tmp_path_factory.mktemp("models"), tiny.CONFIGS["llama"], 3)


KEPT: dict[tuple[Path, ...], bytes] = {}  # models -> the coefficient file of their fit


@pytest.fixture
def config(recipe, models, tmp_path) -> Path:
    """A recipe whose coefficients are fitted, once for all tests."""
    path = recipe(models)
    if tuple(models) not in KEPT:
        fitted(path, tmp_path)
        KEPT[tuple(models)] = (tmp_path / "dam.safetensors").read_bytes()
    (tmp_path / "dam.safetensors").write_bytes(KEPT[tuple(models)])
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("model*.safetensors") for k, v in load_file(file).items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_uniform_coefficients_give_mergekits_linear(recipe, models, tmp_path):
    path = recipe(models, dam={"steps": 0})
    run("mergekit-dam", "run", path, tmp_path / "dam", "--quiet")
    document = yaml.safe_load(path.read_text())
    document.update(merge_method="linear", parameters={"weight": 1.0})
    path.write_text(yaml.safe_dump(document))
    run("mergekit-yaml", path, tmp_path / "linear", "--quiet")
    linear, ours = weights(tmp_path / "linear"), weights(tmp_path / "dam")
    assert linear.keys() == ours.keys()
    for name, tensor in linear.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-7)


@shows("commands", "`mergekit-yaml`", "byte for byte what `mergekit-dam run` writes")
def test_run_equals_fit_and_stock_merge_byte_for_byte(config, tmp_path):
    run("mergekit-dam", "run", config, tmp_path / "run")
    run("mergekit-yaml", config, tmp_path / "stock", "--quiet")
    name = "model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "arxiv.org/abs/2410.08371" in card
    assert "| mean |" in card
    copied = tmp_path / "run" / "dam.safetensors"
    assert copied.read_bytes() == (tmp_path / "dam.safetensors").read_bytes()


@shows("commands", "`mergekit-dam merge`", "the same weights, with the hook switched off, too")
def test_merge_works_with_the_hook_switched_off(config, tmp_path):
    run("mergekit-yaml", config, tmp_path / "stock", "--quiet")
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    run("mergekit-yaml", config, tmp_path / "none", "--quiet", succeeds=False, **off)
    run("mergekit-dam", "merge", config, tmp_path / "ours", "--quiet", **off)
    assert same(weights(tmp_path / "ours"), weights(tmp_path / "stock"))


@shows("commands", f"its flags {named(FLAGS)}", "the same weights")
@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: flags[0])
def test_mergekits_flags(config, tmp_path, flags):
    run("mergekit-yaml", config, tmp_path / "plain", "--quiet")
    run("mergekit-yaml", config, tmp_path / "flags", "--quiet", *flags)
    assert same(weights(tmp_path / "flags"), weights(tmp_path / "plain"))


@shows("commands", f"its flags {named(GPU_FLAGS)}", "tested where there is a GPU")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flags", GPU_FLAGS)
def test_merging_on_a_gpu(config, tmp_path, flags):
    run("mergekit-yaml", config, tmp_path / "cpu", "--quiet")
    run("mergekit-yaml", config, tmp_path / "gpu", "--quiet", *flags)
    expected = weights(tmp_path / "cpu")
    for name, tensor in weights(tmp_path / "gpu").items():
        torch.testing.assert_close(tensor, expected[name])


@shows("settings", "`base_model` that is listed", "is a source")
def test_a_base_that_is_a_source_counts(recipe, models, tmp_path):
    run("mergekit-dam", "run", recipe(models), tmp_path / "without", "--quiet")
    path = recipe(models, base_model=str(models[0]))
    run("mergekit-dam", "run", path, tmp_path / "with", "--quiet")
    assert same(weights(tmp_path / "with"), weights(tmp_path / "without"))


def test_task_vectors_merge_as_they_were_fitted(recipe, models, tmp_path):
    base = tiny.save_model(tmp_path / "base", tiny.CONFIGS["llama"], seed=99)
    path = recipe(models, base_model=str(base), dam={"formula": "task_vectors"})
    logits = fitted(path, tmp_path)
    run("mergekit-yaml", path, tmp_path / "out", "--quiet")
    torch.testing.assert_close(tiny.load(tmp_path / "out")(tiny.tokens()).logits, logits)


def test_moved_models_still_match(config, models, tmp_path):
    run("mergekit-yaml", config, tmp_path / "before", "--quiet")
    document = yaml.safe_load(config.read_text())
    for number, folder in enumerate(models):
        moved = tmp_path / f"elsewhere{number}"
        moved.symlink_to(folder)
        document["models"][number]["model"] = str(moved)
    config.write_text(yaml.safe_dump(document))
    run("mergekit-yaml", config, tmp_path / "after", "--quiet")
    assert same(weights(tmp_path / "after"), weights(tmp_path / "before"))


@shows("commands", "`mergekit-multi`", "the same weights as `mergekit-yaml`")
@shows("commands", "`mergekit-pytorch`", "on raw files with the fitted tensors' names")
def test_mergekit_multi_and_pytorch(config, models, tmp_path):
    run("mergekit-yaml", config, tmp_path / "plain", "--quiet")
    document = yaml.safe_load(config.read_text())
    (tmp_path / "multi.yml").write_text(yaml.safe_dump({**document, "name": "first"}))
    run("mergekit-multi", tmp_path / "multi.yml", "-I", tmp_path / "multi", "--quiet")
    assert same(weights(tmp_path / "multi" / "first"), weights(tmp_path / "plain"))
    raw = {
        "merge_method": "dam",
        "models": [{"model": str(folder / "model.safetensors")} for folder in models],
        "parameters": document["parameters"],
        "dtype": "float32",
    }
    (tmp_path / "raw.yml").write_text(yaml.safe_dump(raw))
    run("mergekit-pytorch", tmp_path / "raw.yml", tmp_path / "raw", "--quiet")
    assert same(weights(tmp_path / "raw"), weights(tmp_path / "plain"))


def test_mergekit_pytorch_on_the_archives_that_were_fitted(recipe, models, tmp_path):
    """An archive alone has the fingerprint of its folder, whatever the order of its records."""
    folders = []
    for model in models:
        folder = shutil.copytree(model, tmp_path / f"{model.name}-bin")
        torch.save(weights(folder), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        folders.append(folder)
    path = recipe(folders)
    run("mergekit-dam", "run", path, tmp_path / "plain", "--quiet")
    raw = {
        "merge_method": "dam",
        "models": [{"model": str(folder / "pytorch_model.bin")} for folder in folders],
        "parameters": {"coefficients": str(tmp_path / "dam.safetensors")},
        "dtype": "float32",
    }
    (tmp_path / "raw.yml").write_text(yaml.safe_dump(raw))
    run("mergekit-pytorch", tmp_path / "raw.yml", tmp_path / "raw", "--quiet")
    assert same(weights(tmp_path / "raw"), weights(tmp_path / "plain"))


@shows("commands", "`merge_state_dicts`", "state dicts, by position")
def test_mergekits_python_api(config, models, tmp_path):
    run("mergekit-yaml", config, tmp_path / "plain", "--quiet")
    file = str(tmp_path / "dam.safetensors")
    merged = merge_state_dicts(
        [weights(folder) for folder in models], "dam", parameters={"coefficients": file}
    )
    assert same(merged, weights(tmp_path / "plain"))


@shows("commands", "`merge_state_dicts` on two modules", "by position, or by the sources' names")
def test_modules_in_memory(recipe, models, tmp_path):
    path = recipe(models[:2])
    fitted(path, tmp_path)
    run("mergekit-yaml", path, tmp_path / "plain", "--quiet")
    settings = {"parameters": {"coefficients": str(tmp_path / "dam.safetensors")}}
    modules = [tiny.load(folder) for folder in models[:2]]
    with torch.no_grad():
        listed = merge_state_dicts(modules, "dam", **settings)
        named = {str(f): m for f, m in zip(models[:2], modules, strict=True)}
        by_name = merge_state_dicts(dict(reversed(named.items())), "dam", **settings)
    assert same(listed, weights(tmp_path / "plain"))
    assert same(by_name, listed)


@shows("commands", "`mergekit-evolve`", "refused there: it allows its own five methods only")
def test_mergekit_evolve_allows_its_own_methods(models):
    with pytest.raises(ValueError, match="Invalid merge method"):
        ModelGenomeDefinition(models=list(map(str, models)), merge_method="dam")
    assert len(METHOD_PARAM_MAPS) == 5


def test_an_existing_folder_is_not_overwritten(config, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    for command in ("run", "merge"):
        assert "--overwrite" in refusal("mergekit-dam", command, config, out)
        message = refusal("mergekit-dam", command, config, out, "--overwrite")
        assert "is not a merge of mergekit's" in message
    assert (out / "precious").read_text() == "mine"


def test_a_merge_can_be_replaced(config, tmp_path):
    out = tmp_path / "out"
    run("mergekit-dam", "merge", config, out, "--quiet")
    (out / "model.safetensors").write_text("damaged")
    (out / "mine.gguf").write_text("mine")
    assert "mine.gguf" in refusal("mergekit-dam", "merge", config, out, "--overwrite")
    (out / "mine.gguf").unlink()
    run("mergekit-dam", "merge", config, out, "--overwrite", "--quiet")
    tiny.load(out)
    assert not list(tmp_path.glob(".*partial*"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("renames", [0, 1])
@pytest.mark.parametrize("is_done", [False, True])
def test_a_merge_that_cannot_be_replaced_is_back(tmp_path, monkeypatch, error, renames, is_done):
    """Whatever comes before, between or after the renames of the old folder and the new one."""
    out, rename, calls = tmp_path / "out", os.replace, []
    out.mkdir()
    (out / "which").write_text("old")

    def fail(*paths):
        calls.append(paths)
        if len(calls) != renames + 1:
            return rename(*paths)
        if is_done:
            rename(*paths)
        raise error

    with pytest.raises(error), appearing(str(out)) as fresh:
        fresh.mkdir()
        (fresh / "which").write_text("new")
        monkeypatch.setattr(os, "replace", fail)
    assert (out / "which").read_text() == ("new" if renames and is_done else "old")
    assert not list(tmp_path.glob(".out.partial-*"))


def test_a_folder_that_holds_an_input_is_never_replaced(config, models, tmp_path, monkeypatch):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path)
    for out in (".", tmp_path, tmp_path.parent, models[0], models[0].parent):
        for command in ("run", "merge"):
            message = refusal("mergekit-dam", command, config, out, "--overwrite")
            assert "which the merge reads" in message
    assert all(path.read_bytes() == content for path, content in before.items())


def test_nor_is_one_that_holds_the_start_of_the_fit(config, tmp_path):
    out = tmp_path / "out"
    run("mergekit-dam", "merge", config, out, "--quiet")
    document = yaml.safe_load(config.read_text())
    document["dam"]["start"] = str(out / "dam.safetensors")
    config.write_text(yaml.safe_dump(document))
    assert "which the merge reads" in refusal("mergekit-dam", "run", config, out, "--overwrite")


def test_what_a_killed_merge_left_is_removed(config, tmp_path):
    dead = tmp_path / ".out.partial-4194304"  # beyond the highest process number
    dead.mkdir()
    (dead / "half").write_text("a model")
    alive = tmp_path / ".out.partial-1"
    alive.mkdir()
    run("mergekit-dam", "merge", config, tmp_path / "out", "--quiet")
    assert not dead.exists()
    assert alive.exists()


def test_the_card_needs_no_network(recipe, models, tmp_path, monkeypatch):
    """mergekit asks the Hub about `folder/model`, even where that folder is here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(models[0].parent)
    path = recipe([Path("models/m0"), Path("models/m1")])
    run("mergekit-dam", "run", path, "out", "--quiet")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "* models/m0" in card
    assert str(tmp_path / "models") not in card
    assert path.read_text() in card
    assert "| mean |" in card
    assert (tmp_path / "out" / "mergekit_config.yml").read_text() == path.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
@pytest.mark.parametrize("flag", ["--cuda", "--multi-gpu"])
def test_a_gpu_that_is_not_there(config, tmp_path, flag):
    assert flag in refusal("mergekit-dam", "merge", config, tmp_path / "out", flag)


class TestRefusals:
    """Each in one sentence with the remedy, by stock mergekit-yaml too."""

    def test_no_coefficients(self, config, tmp_path):
        document = yaml.safe_load(config.read_text())
        del document["parameters"]
        config.write_text(yaml.safe_dump(document))
        assert "mergekit-dam fit" in refusal("mergekit-yaml", config, tmp_path / "out")

    def test_file_missing(self, config, tmp_path):
        (tmp_path / "dam.safetensors").unlink()
        assert "mergekit-dam fit" in refusal("mergekit-yaml", config, tmp_path / "out")

    def test_file_is_something_else(self, config, tmp_path):
        (tmp_path / "dam.safetensors").write_text("hello")
        message = refusal("mergekit-yaml", config, tmp_path / "out")
        assert "is not a safetensors file" in message

    def test_what_a_stranger_has_written_does_nothing_to_the_terminal(self, config, tmp_path):
        file = CoefficientFile(tmp_path / "dam.safetensors")
        evil = "\x1b[2J" + "x" * 5000
        lies = {"tokenizer": evil, "settings": {**file.header.settings, "granularity": evil}}
        tensors = {name: file.get(name) for name in file.names}
        save(file.path, tensors, file.header.model_copy(update=lies))
        result = run("mergekit-dam", "merge", config, tmp_path / "out", succeeds=False)
        for name in ("tokenizer", "granularity"):
            assert f"was fitted with `{name}: [2Jxxx" in result.stderr
        assert "\x1b" not in result.stderr
        assert len(result.stderr) < 2000

    def test_other_sources(self, config, tmp_path):
        other = tiny.save_model(tmp_path / "other", tiny.CONFIGS["llama"], seed=50)
        document = yaml.safe_load(config.read_text())
        document["models"][1]["model"] = str(other)
        config.write_text(yaml.safe_dump(document))
        for command in ("mergekit-yaml", "mergekit-dam merge"):
            message = refusal(*command.split(), config, tmp_path / "out")
            assert str(other) in message
            assert "fitted for" in message

    def test_one_source_fewer(self, config, models, tmp_path):
        document = yaml.safe_load(config.read_text())
        del document["models"][2]
        config.write_text(yaml.safe_dump(document))
        for command in ("mergekit-yaml", "mergekit-dam merge"):
            assert str(models[2]) in refusal(*command.split(), config, tmp_path / "out")

    def test_missing_and_extra_tensors_and_wrong_shapes(self, config, tmp_path):
        path = tmp_path / "dam.safetensors"
        file = CoefficientFile(path)
        good = {name: file.get(name) for name in file.names}
        name = "model.norm.weight"
        lacking = {key: value for key, value in good.items() if key != name}
        save(path, lacking, file.header)
        for command in ("mergekit-yaml", "mergekit-dam merge"):
            assert name in refusal(*command.split(), config, tmp_path / "out")
        save(path, {**good, "model.extra.weight": good[name].clone()}, file.header)
        for command in ("mergekit-yaml", "mergekit-dam merge"):
            message = refusal(*command.split(), config, tmp_path / "out")
            assert "model.extra.weight, which this merge does not write" in message
        save(path, {**good, name: torch.ones(3, 7)}, file.header)
        for command in ("mergekit-yaml", "mergekit-dam merge"):
            assert "[7]" in refusal(*command.split(), config, tmp_path / "out")


def test_a_file_for_more_layers_than_the_merge_writes(config, models, tmp_path):
    """The same sources, of which the merge cuts a layer out."""
    document = yaml.safe_load(config.read_text())
    del document["models"]
    sources = [{"model": str(folder), "layer_range": [0, 1]} for folder in models]
    document["slices"] = [{"sources": sources}]
    config.write_text(yaml.safe_dump(document))
    for command in ("mergekit-yaml", "mergekit-dam merge"):
        assert "model.layers.1." in refusal(*command.split(), config, tmp_path / command)


def test_only_a_merge_that_is_planned_must_write_every_tensor(config, models, tmp_path):
    """mergekit's API may merge a part of a model, after a merge by YAML in the same process."""
    merge, plan = read_recipe(str(config)).merge, read_recipe(str(config)).merge
    del plan.models[1:]  # other sources, planned in between
    run_merge(merge.model_copy(deep=True), str(tmp_path / "out"), QUIET)
    plan_merge(plan, QUIET, "weights")
    name, file = "model.norm.weight", str(tmp_path / "dam.safetensors")
    tensors = [weights(folder)[name] for folder in models]
    settings = {"parameters": {"coefficients": file}}
    expected = weights(tmp_path / "out")[name]
    assert torch.equal(merge_tensors(tensors, "dam", name=name, **settings), expected)
    part = merge_state_dicts([{name: tensor} for tensor in tensors], "dam", **settings)
    assert torch.equal(part[name], expected)
    run_merge(merge, str(tmp_path / "again"), QUIET)
    assert same(weights(tmp_path / "again"), weights(tmp_path / "out"))


@shows("settings", "tied and untied heads together", "mergekit follows the tie")
def test_an_optional_tensor_that_one_source_lacks(recipe, tmp_path):
    """A source with a tied head among others: mergekit follows the tie."""
    untied = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    tied = tiny.save_model(tmp_path / "tied", tiny.CONFIGS["llama_tied"], seed=5)
    path = recipe([*untied, tied], base_model=str(untied[0]))
    logits = fitted(path, tmp_path)
    run("mergekit-yaml", path, tmp_path / "out", "--quiet")
    torch.testing.assert_close(tiny.load(tmp_path / "out")(tiny.tokens()).logits, logits)


@shows("settings", "a tied config, and heads in the files", "each head is merged, and warned of")
@pytest.mark.parametrize("has_base", [True, False])
def test_a_head_of_its_own_in_a_tied_merge(recipe, tmp_path, has_base):
    tied = tiny.save_models(tmp_path, tiny.CONFIGS["llama_tied"], 2)
    own = tiny.save_model(tmp_path / "own", tiny.CONFIGS["llama"], seed=5)
    if not has_base:  # its config says otherwise than its files
        config = json.loads((own / "config.json").read_text())
        (own / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    path = recipe([tied[1], own], **({"base_model": str(tied[0])} if has_base else {}))
    assert "ties lm_head.weight to another tensor" in run("mergekit-dam", "check", path).stderr
    logits = fitted(path, tmp_path)
    run("mergekit-yaml", path, tmp_path / "out", "--quiet")
    torch.testing.assert_close(tiny.load(tmp_path / "out")(tiny.tokens()).logits, logits)
    file = CoefficientFile(tmp_path / "dam.safetensors")
    assert file.header.results.fit[1].source_perplexity == pytest.approx(
        perplexity(own, prepared_rows(path, 1)), rel=1e-4
    )


def prepared_rows(path: Path, source: int) -> list[list[int]]:
    prepared = prepare(read_recipe(str(path)), QUIET, device="cpu")
    return [row.ids for row in prepared.data[source].held_out]


def perplexity(folder: Path, rows: list[list[int]]) -> float:
    """Of a model on its own, over all predicted tokens."""
    model, surprise, tokens = tiny.load(folder), 0.0, 0
    for row in rows:
        ids = torch.tensor([row])
        logits = model(ids).logits[0, :-1]
        surprise += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += len(row) - 1
    return math.exp(surprise / tokens)


def test_the_figures_in_the_file_are_those_of_the_merged_model(config, tmp_path):
    recipe = read_recipe(str(config))
    prepared = prepare(recipe, QUIET, device="cpu")
    file = CoefficientFile(recipe.coefficients)
    with torch.no_grad():
        for name, coefficient in prepared.merged.coefficients().items():
            coefficient.copy_(file.get(name))
    held_out = [source.held_out for source in prepared.data]
    figures = evaluate(prepared.merged, held_out, prepared.needs.tokens, prepared.needs.widest)
    assert figures == file.header.results.fit


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05])
def test_a_merge_killed_at_any_moment_leaves_no_half_model(config, tmp_path, delay):
    out = tmp_path / "out"
    begun = []

    def is_time() -> bool:
        if list(tmp_path.glob(".out.partial-*")):
            begun.append(time.monotonic())
        return bool(begun) and time.monotonic() >= begun[0] + delay

    kill_when(is_time, "mergekit-dam", "merge", config, out, "--quiet")
    if out.exists():  # it was quicker than we
        tiny.load(out)
    else:
        run("mergekit-dam", "merge", config, out, "--quiet")
        tiny.load(out)
    assert not list(tmp_path.glob(".out.partial-*"))


def test_folders_with_spaces(recipe, tmp_path):
    """As in `My Drive`."""
    models = tiny.save_models(tmp_path / "my models", tiny.CONFIGS["llama"], 2)
    run("mergekit-dam", "run", recipe(models), tmp_path / "my merge", "--quiet")
    tiny.load(tmp_path / "my merge")
