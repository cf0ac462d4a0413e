"""Adapters as sources: `model+adapter`, merged once into a cache that is neither half nor stale."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import peft
import pytest
import tiny
import torch
import transformers
from commands import refusal, run
from compatibility import shows
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from test_merge import fitted, same, weights

from mergekit_dam.adapters import RECORD, with_lora_cache
from mergekit_dam.sources import describe

QUIET = MergeOptions(quiet=True)


def save_adapter(folder: Path, base: Path, seed: int, **settings: object) -> Path:
    """A random adapter that changes its base: PEFT's own begins with B = 0."""
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], **settings}
    model = peft.get_peft_model(tiny.load(base), peft.LoraConfig(**settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return folder


def llama(**sizes: int) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**tiny.SIZES | sizes)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("base") / "base", tiny.CONFIGS["llama"], 0)


@pytest.fixture(scope="module")
def adapted(base) -> list[str]:
    """Two adapters of one base, for different modules."""
    first = save_adapter(base.parent / "first", base, 1)
    second = save_adapter(base.parent / "second", base, 2, target_modules=["v_proj", "up_proj"])
    return [f"{base}+{first}", f"{base}+{second}"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """The Hub's cache home, of this process and of the commands that are forked from it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def provide(cache) -> Callable[[str], Path]:
    """Has one reference merged into the cache; returns the folder that mergekit would use."""

    def call(reference: str, **options: object) -> Path:
        model = ModelReference.parse(reference)
        given = MergeOptions(quiet=True, lora_merge_cache=str(cache), **options)
        assert with_lora_cache(given, [model]) == given
        (folder,) = cache.glob("[!.]*")
        return folder

    return call


# ---- fit and merge


@shows("sources", "adapters: `model+adapter`", "several of one base, together with the base")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_logits_equal_the_fits(recipe, base, adapted, home, tmp_path, dtype):
    path = recipe([*adapted, base], dtype=dtype)
    logits = fitted(path, tmp_path)
    run("mergekit-yaml", path, tmp_path / "out", "--quiet", "--lora-merge-cache", tmp_path / "lora")
    torch.testing.assert_close(tiny.load(tmp_path / "out")(tiny.tokens()).logits, logits)
    run("mergekit-dam", "merge", path, tmp_path / "ours", "--quiet")
    assert same(weights(tmp_path / "ours"), weights(tmp_path / "out"))
    assert len(list(home.rglob("config.json"))) == 2


def test_run_needs_no_flag(recipe, adapted, home, tmp_path):
    path = recipe(adapted, dam={"steps": 1})
    before = os.listdir()
    run("mergekit-dam", "run", path, tmp_path / "out", "--quiet")
    assert os.listdir() == before
    tiny.load(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert len(list(home.rglob("config.json"))) == 2


def test_the_flag_names_the_cache_that_stock_mergekit_takes(recipe, adapted, home, cache, tmp_path):
    path = recipe(adapted, dam={"steps": 1})
    run("mergekit-dam", "run", path, tmp_path / "out", "--quiet", "--lora-merge-cache", cache)
    assert not home.exists()
    before = {file: file.stat().st_mtime_ns for file in cache.rglob("*")}
    run("mergekit-yaml", path, tmp_path / "stock", "--quiet", "--lora-merge-cache", cache)
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*")} == before
    assert same(weights(tmp_path / "stock"), weights(tmp_path / "out"))


@shows("sources", "a `base_model` with an adapter", "of task vectors, too")
def test_a_base_with_an_adapter(recipe, adapted, tmp_path):
    path = recipe(adapted[:1], base_model=adapted[1], dam={"formula": "task_vectors"})
    logits = fitted(path, tmp_path)
    run("mergekit-yaml", path, tmp_path / "out", "--quiet", "--lora-merge-cache", tmp_path / "lora")
    torch.testing.assert_close(tiny.load(tmp_path / "out")(tiny.tokens()).logits, logits)


@shows("sources", "adapters of GPT-2", "whose weights are transposed")
def test_gpt2s_transposed_weights(recipe, tmp_path):
    base = tiny.save_model(tmp_path / "base", tiny.CONFIGS["gpt2"], 0)
    names = [
        f"{base}+{save_adapter(tmp_path / f'a{seed}', base, seed, target_modules=['c_attn'])}"
        for seed in (1, 2)
    ]
    path = recipe(names)
    logits = fitted(path, tmp_path)
    run("mergekit-yaml", path, tmp_path / "out", "--quiet", "--lora-merge-cache", tmp_path / "lora")
    torch.testing.assert_close(tiny.load(tmp_path / "out")(tiny.tokens()).logits, logits)


# ---- the cache


def test_models_without_adapters_need_no_cache(base, home):
    assert with_lora_cache(QUIET, [ModelReference.parse(str(base))]) is QUIET
    assert not home.exists()


def test_relative_paths_have_a_cache_for_each_working_directory(
    base, adapted, home, tmp_path, monkeypatch
):
    names = [ModelReference.parse("base+first")]
    found = set()
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        for name in ("base", "first"):
            (tmp_path / folder / name).symlink_to(base.parent / name)
        monkeypatch.chdir(tmp_path / folder)
        found.add(with_lora_cache(QUIET, names).lora_merge_cache)
    assert len(found) == 2
    assert all(Path(cache).is_relative_to(home) for cache in found)


def test_what_is_whole_and_current_is_kept(provide, adapted):
    folder = provide(adapted[0])
    inode = folder.stat().st_ino
    assert provide(adapted[0]).stat().st_ino == inode
    assert [path.suffix for path in folder.parent.glob(".*")] == [".lock"]


def in_memory(folder: Path) -> dict[str, torch.Tensor]:
    """Not mapped from the file, which is about to be damaged."""
    return {name: tensor.clone() for name, tensor in weights(folder).items()}


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: cut(folder / "model.safetensors"),
        lambda folder: os.truncate(folder / "model.safetensors", 4),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / RECORD).unlink(),  # stock mergekit's
        lambda folder: [path.unlink() for path in folder.iterdir()],  # killed before it wrote
    ],
    ids=["cut", "header", "no weights", "no config", "unknown", "empty"],
)
def test_a_half_written_merge_is_made_again(provide, adapted, damage):
    folder = provide(adapted[0])
    good = in_memory(folder)
    damage(folder)
    assert same(weights(provide(adapted[0])), good)


def test_a_missing_shard_is_noticed(provide, base, adapted):
    folder = provide(adapted[0])
    good = in_memory(folder)
    model = tiny.load(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="4KB")
    inode = folder.stat().st_ino
    assert provide(adapted[0]).stat().st_ino == inode
    next(folder.glob("model-00002-*")).unlink()
    assert same(weights(provide(adapted[0])), good)


def test_a_killed_merge_leaves_no_merge(provide, cache, adapted, monkeypatch):
    """Killed before the weights are whole: the folder is not there, and what is left goes."""
    save = transformers.PreTrainedModel.save_pretrained

    def killed(self, folder, **settings):
        save(self, folder, **settings)
        cut(Path(folder) / "model.safetensors")
        os._exit(9)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", killed)
        process = os.fork()
        if process == 0:
            provide(adapted[0])
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert [path.suffix for path in cache.iterdir()] != []
    assert not list(cache.glob("[!.]*"))
    tiny.load(provide(adapted[0]))
    assert not list(cache.glob(".*.partial"))


def test_processes_that_need_one_adapter_merge_it_once(provide, cache, adapted, monkeypatch):
    log, merged = cache.parent / "log", ModelReference.merged

    def logged(self, **arguments):
        with log.open("a") as file:
            file.write("merged\n")
        return merged(self, **arguments)

    monkeypatch.setattr(ModelReference, "merged", logged)
    processes = []
    for _ in range(3):
        process = os.fork()
        if process == 0:
            provide(adapted[0])
            os._exit(0)
        processes.append(process)
    assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0, 0]
    assert log.read_text() == "merged\n"


@pytest.mark.parametrize("change", ["weights", "scale", "base", "dtype"])
def test_nothing_stale_is_served(provide, tmp_path, change):
    base = tiny.save_model(tmp_path / "base", tiny.CONFIGS["llama"], 0)
    adapter = save_adapter(tmp_path / "adapter", base, 1)
    before = weights(provide(f"{base}+{adapter}"))
    options = {}
    if change == "base":
        tiny.save_model(base, tiny.CONFIGS["llama"], 5)
    elif change == "dtype":
        options = {"lora_merge_dtype": "bfloat16"}
    else:
        changes = {"lora_alpha": 16} if change == "scale" else {}
        save_adapter(adapter, base, 9 if change == "weights" else 1, **changes)
    after = weights(provide(f"{base}+{adapter}", **options))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert before[name].dtype != after[name].dtype or not torch.equal(before[name], after[name])


def test_saving_an_adapter_again_changes_nothing(provide, base, adapted, tmp_path):
    first = tmp_path / "first"
    again = peft.PeftModel.from_pretrained(tiny.load(base), adapted[0].partition("+")[2])
    again.save_pretrained(first)
    config = first / "adapter_config.json"
    fields = json.loads(config.read_text())
    fields["target_modules"].reverse()
    config.write_text(json.dumps({**fields, "base_model_name_or_path": "elsewhere"}))
    identities = [describe(ModelReference.parse(name)) for name in (adapted[0], f"{base}+{first}")]
    assert len({(identity.weights, identity.config) for identity in identities}) == 1


def test_an_adapters_scale_is_part_of_its_identity(base, tmp_path):
    names = [
        f"{base}+{save_adapter(tmp_path / str(alpha), base, 1, lora_alpha=alpha)}"
        for alpha in (4, 8)
    ]
    first, second = (describe(ModelReference.parse(name)) for name in names)
    assert first.weights == second.weights
    assert first.config != second.config


def test_a_changed_adapter_is_refused_with_the_old_coefficients(recipe, tmp_path):
    base = tiny.save_model(tmp_path / "base", tiny.CONFIGS["llama"], 0)
    adapter = save_adapter(tmp_path / "adapter", base, 1)
    path = recipe([f"{base}+{adapter}", base], dam={"steps": 0})
    run("mergekit-dam", "fit", path, "--quiet")
    save_adapter(adapter, base, 9)
    assert "has changed since" in refusal("mergekit-dam", "merge", path, tmp_path / "out")


# ---- refusals


@shows("refused sources", "an adapter that is missing", "the adapter, what its folder needs")
def test_a_missing_adapter(recipe, base, tmp_path):
    path = recipe([f"{base}+{tmp_path / 'nowhere'}"])
    message = refusal("mergekit-dam", "check", path)
    assert f"adapter {tmp_path / 'nowhere'}" in message
    assert "adapter_config.json" in message


def test_a_missing_base(recipe, base, adapted, tmp_path):
    path = recipe([adapted[0].replace(str(base), str(tmp_path / "nowhere"))])
    message = refusal("mergekit-dam", "check", path)
    assert f"model {tmp_path / 'nowhere'} under the adapter" in message


@shows("refused sources", "an adapter of another base", "the first weight that it does not fit")
@pytest.mark.parametrize("change", [{"hidden_size": 32}, {"num_hidden_layers": 3}])
def test_an_adapter_of_another_base_is_refused_before_weights_are_loaded(
    recipe, base, tmp_path, monkeypatch, change
):
    other = tiny.save_model(tmp_path / "other", llama(**change), 3)
    adapter = save_adapter(tmp_path / "adapter", other, 1)
    monkeypatch.setattr(ModelReference, "merged", None)
    message = refusal("mergekit-dam", "check", recipe([f"{base}+{adapter}"]))
    layer = 2 if "num_hidden_layers" in change else 0
    assert f"model.layers.{layer}.mlp.down_proj.weight" in message
    assert "the base on which it was trained" in message


def test_an_adapter_of_a_shallower_base(recipe, base, adapted, cache, tmp_path):
    """PEFT alone warns, and merges an adapter of which a part is missing."""
    deep = tiny.save_model(tmp_path / "deep", llama(num_hidden_layers=3), 3)
    path = recipe([adapted[0].replace(str(base), str(deep), 1).replace(str(base), str(deep))])
    message = refusal("mergekit-dam", "check", path, "--lora-merge-cache", cache)
    assert "model.layers.2.self_attn.q_proj" in message
    assert "the base on which it was trained" in message
    assert not list(cache.glob("[!.]*"))
    assert not list(cache.glob(".*.partial"))


def test_a_cache_that_cannot_be_made(recipe, adapted, tmp_path):
    (tmp_path / "file").write_text("")
    path = recipe(adapted)
    message = refusal("mergekit-dam", "check", path, "--lora-merge-cache", tmp_path / "file")
    assert "--lora-merge-cache" in message


def test_merged_weights_are_the_bases_plus_the_adapters_product(provide, base, adapted):
    folder = provide(adapted[0])
    adapter = load_file(Path(adapted[0].partition("+")[2]) / "adapter_model.safetensors")
    module = "model.layers.1.mlp.down_proj"
    down, up = (adapter[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
    expected = load_file(base / "model.safetensors")[f"{module}.weight"] + 2 * up @ down
    torch.testing.assert_close(weights(folder)[f"{module}.weight"], expected)
