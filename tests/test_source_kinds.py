"""All kinds of sources, each fitted, merged by stock mergekit-yaml and loaded strictly."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny
import torch
import transformers
import yaml
from commands import refusal, run
from compatibility import shows
from mergekit.io import LazyTensorLoader
from safetensors.torch import load_file, save_file
from test_merge import fitted, same, weights

LLAMA = tiny.CONFIGS["llama"]


def llama(**sizes: int) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**tiny.SIZES | sizes)


def shard(folder: Path, size: str = "4KB") -> Path:
    """The same checkpoint in several files."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=size)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def pickle(folder: Path) -> Path:
    """The same checkpoint as an older transformers saved it."""
    path = folder / "model.safetensors"
    torch.save({k: v.clone() for k, v in load_file(path).items()}, folder / "pytorch_model.bin")
    path.unlink()
    return folder


@pytest.fixture
def merged(recipe, tmp_path) -> Callable[..., Path]:
    """Fits, merges with mergekit-yaml, and compares the loaded model's logits with the fit's."""

    def call(models: Sequence[Path], *flags: str, **keys) -> Path:
        path = recipe(list(models), **keys)
        run("mergekit-dam", "check", path, *flags)
        logits = fitted(path, tmp_path)
        run("mergekit-yaml", path, tmp_path / "out", "--quiet", *flags)
        torch.testing.assert_close(tiny.load(tmp_path / "out")(tiny.tokens()).logits, logits)
        return tmp_path / "out"

    return call


def dtypes(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


# ---- kinds of sources


@shows(
    "sources",
    "float32, bfloat16 and float16 together",
    "`dtype` decides; without it mergekit takes the widest",
)
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_mixed_dtypes(merged, tmp_path, dtype):
    """Without `dtype` mergekit brings all to the widest."""
    kinds = (torch.bfloat16, torch.float32, torch.float16)
    models = [tiny.save_model(tmp_path / str(kind), LLAMA, i, kind) for i, kind in enumerate(kinds)]
    out = merged(models, dtype=dtype)
    assert dtypes(out) == {getattr(torch, dtype or "float32")}


@shows("sources", "all float16", "with `dtype: float16`, with none, and with `out_dtype`")
@pytest.mark.parametrize("keys", [{"dtype": "float16"}, {"dtype": None},
                                  {"dtype": "float32", "out_dtype": "float16"}])  # fmt: skip
def test_float16(merged, tmp_path, keys):
    out = merged(tiny.save_models(tmp_path, LLAMA, 2, torch.float16), **keys)
    assert dtypes(out) == {torch.float16}


@shows("sources", "sharded `.safetensors`", "beside whole ones")
def test_sharded_checkpoints(merged, tmp_path):
    whole, *others = tiny.save_models(tmp_path, LLAMA, 3)
    merged([whole, shard(others[0]), shard(others[1], "7KB")])


@shows("sources", "`pytorch_model.bin`", "with and without `--lazy-unpickle`")
@pytest.mark.parametrize("flags", [(), ("--lazy-unpickle",)])
@pytest.mark.parametrize("architecture", ["llama", "llama_tied"])
def test_bin_checkpoints(merged, tmp_path, architecture, flags):
    models = tiny.save_models(tmp_path, tiny.CONFIGS[architecture], 2)
    merged(map(pickle, models), *flags)


@shows("sources", "`pytorch_model.bin` beside safetensors, sharded or not", "mixed as you like")
def test_bin_beside_safetensors(merged, tmp_path):
    first, second, third = tiny.save_models(tmp_path, LLAMA, 3)
    merged([pickle(first), second, shard(third)])


@shows("sources", "sharded `.bin`", "all the same")
def test_sharded_bin_checkpoints(merged, tmp_path):
    models = tiny.save_models(tmp_path, LLAMA, 2)
    for model in models:
        split_bin(pickle(model))
    merged(models)


def split_bin(folder: Path) -> None:
    tensors = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    weight_map = {}
    for number, name in enumerate(sorted(tensors)):
        file = f"pytorch_model-{number % 2 + 1:05}-of-00002.bin"
        weight_map[name] = file
    for file in set(weight_map.values()):
        torch.save({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@shows("sources", "one source", "its columns are scaled")
def test_one_source(merged, tmp_path):
    merged(tiny.save_models(tmp_path, LLAMA, 1))


@shows("sources", "ten sources", "")
def test_ten_sources(merged, tmp_path):
    merged(tiny.save_models(tmp_path, LLAMA, 10), rows=8)


@shows("sources", "a base that is also a source", "with data of its own")
def test_a_base_that_is_also_a_source(merged, tmp_path):
    models = tiny.save_models(tmp_path, LLAMA, 3)
    merged(models, base_model=str(models[1]))


@shows(
    "sources", "a source in two folders (a copy)", "each copy with data and coefficients of its own"
)
def test_two_copies_of_one_source(merged, tmp_path):
    """What to do for a model with two sets of data."""
    models = tiny.save_models(tmp_path, LLAMA, 2)
    merged([*models, Path(shutil.copytree(models[0], tmp_path / "copy"))])


def edit_config(folder: Path, **keys) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return folder


@shows(
    "sources",
    "fine-tunes whose config.json has other keys without an effect",
    "Unsloth's, dropout, labels, `max_position_embeddings`: one layout",
)
def test_a_config_with_other_keys(merged, tmp_path):
    """Without a base, too, and by least squares, which compares layer with layer."""
    first, second, third = tiny.save_models(tmp_path, tiny.CONFIGS["qwen2"], 3)
    edit_config(first, max_position_embeddings=32, max_window_layers=1, use_mrope=False)
    edit_config(second, unsloth_version="2025.1", unsloth_fixed=True, attention_dropout=0.1)
    labels = {"id2label": {"0": "good"}, "label2id": {"good": 0}, "auto_map": {"AutoModel": "a.B"}}
    edit_config(third, **labels, use_flash_attention_2=True, pretraining_tp=2)
    merged([first, second, third], dam={"start": "least_squares", "steps": 1})


def test_a_source_that_is_held_twice_is_told(recipe, tmp_path):
    first, second = tiny.save_models(tmp_path, LLAMA, 2)
    edit_config(second, rms_norm_eps=0.5, unsloth_version="2025.1")
    path = recipe([first, second], base_model=str(first), dam={"start": None})
    told = run("mergekit-dam", "check", path).stdout
    assert (
        f"{second} is held twice, within the merge and as a model of its own: its config.json "
        "differs from the merge's in rms_norm_eps\nso the fit starts from the average: "
    ) in told
    assert f"{first} is held" not in told


# ---- refused before any weight is loaded


@pytest.fixture
def check(recipe, monkeypatch) -> Callable[..., str]:
    """The message with which `check` refuses; nothing may ask for a tensor."""
    monkeypatch.setattr(LazyTensorLoader, "get_tensor", None)

    def call(sources: Sequence[Path], **keys) -> str:
        return refusal("mergekit-dam", "check", recipe(list(sources), **keys))

    return call


@pytest.fixture(params=["safetensors", "bin"])
def save(request, tmp_path) -> Callable[..., Path]:
    def call(config: transformers.PretrainedConfig, seed: int) -> Path:
        folder = tiny.save_model(tmp_path / f"m{seed}", config, seed)
        return pickle(folder) if request.param == "bin" else folder

    return call


@shows("refused sources", "a source listed twice", "the model; keep one entry")
def test_a_source_listed_twice(check, recipe, tmp_path):
    first, second = tiny.save_models(tmp_path, LLAMA, 2)
    message = check([first, second, first])
    assert f"{first} is listed twice" in message
    assert "keep one" in message
    path = recipe([first, second])
    document = yaml.safe_load(path.read_text())
    document["models"] += document["models"][:1]
    path.write_text(yaml.safe_dump(document))
    for command in ("check", "fit"):
        assert f"{first} is listed twice" in refusal("mergekit-dam", command, path)


@shows("refused sources", "the same, as `m0` and `./m0`", "both names")
@pytest.mark.parametrize("other", ["./m0", "m0/", "sub/../m0", "{}/m0"])
def test_a_source_listed_twice_under_two_names(recipe, tmp_path, monkeypatch, other):
    tiny.save_models(tmp_path, LLAMA, 1)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    path = recipe([Path("m0")])
    document = yaml.safe_load(path.read_text())
    document["models"].append({"model": other.format(tmp_path)})
    path.write_text(yaml.safe_dump(document))
    message = refusal("mergekit-dam", "check", path)
    assert "is listed twice (as m0, too)" in message


@shows(
    "refused sources",
    "one architecture with different options",
    "the tensor that one lacks, the options in which their configs differ",
)
def test_a_tensor_that_one_source_lacks_by_its_config(recipe, tmp_path):
    configs = [transformers.CohereConfig(**tiny.SIZES, use_qk_norm=bool(n)) for n in range(2)]
    models = [tiny.save_model(tmp_path / f"m{n}", config, n) for n, config in enumerate(configs)]
    message = refusal("mergekit-dam", "check", recipe(models, base_model=str(models[1])))
    assert f"{models[0]} has no tensor model.layers.0.self_attn.q_norm.weight" in message
    assert f"{models[1]} has it; their configs differ in use_qk_norm" in message


@shows(
    "refused sources",
    "an option that mergekit does not describe (`attention_bias` of Llama)",
    "the tensor that the merge would lack",
)
def test_an_option_that_mergekit_does_not_describe(recipe, tmp_path):
    models = [tiny.save_model(tmp_path / f"m{n}", llama(attention_bias=True), n) for n in range(2)]
    message = refusal("mergekit-dam", "check", recipe(models))
    assert "no tensor for model.layers.0.self_attn.q_proj.bias of LlamaForCausalLM" in message
    assert "mergekit's description of this architecture lacks it" in message


@shows("refused sources", "a source twice in one slice", "the model")
def test_a_source_twice_in_one_slice(recipe, tmp_path):
    (model,) = tiny.save_models(tmp_path, LLAMA, 1)
    path = recipe([model])
    document = yaml.safe_load(path.read_text())
    del document["models"]
    document["slices"] = [{"sources": [{"model": str(model), "layer_range": [0, 2]}] * 2}]
    path.write_text(yaml.safe_dump(document))
    assert f"{model} is listed twice" in refusal("mergekit-dam", "check", path)


@shows(
    "refused sources",
    "different architectures",
    "two models, their architectures, a tensor that only one has",
)
@pytest.mark.parametrize("other", ["qwen2", "gpt2"])
def test_another_architecture(check, save, other):
    first, second = save(LLAMA, 0), save(tiny.CONFIGS[other], 1)
    message = check([first, second])
    assert f"{first} is LlamaForCausalLM" in message
    assert tiny.CONFIGS[other].model_type in message.lower()
    assert ".weight" in message or ".bias" in message
    assert "choose models of one architecture" in message


@shows("refused sources", "one architecture under two names (Llama, Mistral)", "`--allow-crimes`")
def test_another_name_for_one_architecture(check, recipe, tmp_path):
    """A Mistral's tensors are a Llama's."""
    first = tiny.save_model(tmp_path / "llama", LLAMA, 0)
    second = tiny.save_model(tmp_path / "mistral", transformers.MistralConfig(**tiny.SIZES), 1)
    assert "--allow-crimes" in check([first, second])


@shows("sources", "one architecture under two names (Llama, Mistral)", "with `--allow-crimes`")
def test_crimes(recipe, tmp_path):
    first = tiny.save_model(tmp_path / "llama", LLAMA, 0)
    second = tiny.save_model(tmp_path / "mistral", transformers.MistralConfig(**tiny.SIZES), 1)
    path = recipe([first, second], base_model=str(first))
    run("mergekit-dam", "run", path, tmp_path / "ours", "--quiet", "--allow-crimes")
    run("mergekit-yaml", path, tmp_path / "stock", "--quiet", "--allow-crimes")
    assert same(weights(tmp_path / "ours"), weights(tmp_path / "stock"))
    tiny.load(tmp_path / "stock")


@shows(
    "refused sources",
    "different width (hidden, intermediate, heads)",
    "the first tensor that differs, its shapes; choose models of one size",
)
@pytest.mark.parametrize(
    ("sizes", "tensor"),
    [
        ({"hidden_size": 32}, "model.embed_tokens.weight"),
        ({"intermediate_size": 40}, "model.layers.0.mlp"),
        ({"num_attention_heads": 4, "head_dim": 8}, "model.layers.0.self_attn"),
    ],
    ids=["hidden", "intermediate", "heads"],
)
def test_another_width(check, save, sizes, tensor):
    message = check([save(LLAMA, 0), save(llama(**sizes), 1)])
    assert f"shapes of {tensor}" in message
    assert "one architecture and size" in message


@shows(
    "refused sources",
    "different numbers of layers, the base's too",
    "both numbers, a tensor that one lacks; `slices:`",
)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("role", ["source", "base"])
def test_another_number_of_layers(check, save, layers, role):
    first, second = save(LLAMA, 0), save(llama(num_hidden_layers=layers), 1)
    keys = {"base_model": str(second)} if role == "base" else {}
    message = check([first] if keys else [first, second], **keys)
    assert f"{second} has {layers}" in message or f"{second} {layers}" in message
    assert f"model.layers.{min(layers, 2)}." in message
    assert "slices" in message


@shows(
    "refused sources",
    "different vocabulary without a `tokenizer` setting",
    "the embedding, its shapes; `tokenizer: {source: union}`",
)
def test_another_vocabulary(check, save):
    message = check([save(LLAMA, 0), save(llama(vocab_size=50), 1)])
    assert "model.embed_tokens.weight" in message
    assert "tokenizer" in message


@shows(
    "refused sources",
    "weights that the config promises and the files lack",
    "the model, the tensor",
)
def test_missing_weights_of_one_layer(check, save):
    """A config that promises more than the weights hold."""
    first, second = save(LLAMA, 0), save(LLAMA, 1)
    name = "model.layers.1.mlp.up_proj.weight"
    for file, load, write in (
        ("model.safetensors", load_file, save_file),
        ("pytorch_model.bin", torch.load, torch.save),
    ):
        if (second / file).exists():
            tensors = {k: v.clone() for k, v in load(second / file).items() if k != name}
            write(tensors, second / file)
    message = check([first, second])
    assert f"{second} has no tensor {name}" in message


QUANTISED = "give the model that it was made of, or save it dequantised"


@shows(
    "refused sources",
    "a quantised model, by its config (FP8, bitsandbytes, GPTQ, AWQ, MXFP4), the base's too",
    "the model, the method; where to get its numbers",
)
@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "gptq", "awq", "mxfp4"])
@pytest.mark.parametrize("role", ["source", "base"])
def test_a_quantised_config(check, recipe, tmp_path, method, role):
    first, second = tiny.save_models(tmp_path, LLAMA, 2)
    edit_config(second, quantization_config={"quant_method": method})
    models, keys = (
        ([first], {"base_model": str(second)}) if role == "base" else ([first, second], {})
    )
    message = check(models, **keys)
    assert f"{second} is quantised ({method}, says `quantization_config`" in message
    assert QUANTISED in message
    for command in ("fit", "run"):
        out = [tmp_path / "out"] * (command == "run")
        assert QUANTISED in refusal("mergekit-dam", command, recipe(models, **keys), *out)


@shows(
    "refused sources",
    "quantised weights under a config that does not say so",
    "the model, the first such tensor, its dtype; where to get its numbers",
)
@pytest.mark.parametrize(
    ("dtype", "code"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.uint8, "U8")]
)
def test_quantised_weights(check, tmp_path, dtype, code):
    first, second = tiny.save_models(tmp_path, LLAMA, 2)
    name, path = "model.layers.1.mlp.up_proj.weight", second / "model.safetensors"
    tensors = load_file(path)
    packed = tensors[name].to(dtype)
    tensors[name] = packed.reshape(-1, 1) if dtype == torch.uint8 else packed  # as 4-bit ones are
    save_file(tensors, path)
    message = check([first, second])
    assert f"{second} holds {name} as {code}" in message
    assert QUANTISED in message
    assert "shapes" not in message
    assert f"{second} holds {name} as" in check([first, pickle(second)])


@pytest.mark.parametrize("word", ["load", "int8", ""])
def test_a_dtype_that_is_none(check, tmp_path, word):
    """`torch` has functions of some such names; a shard is not opened before its header is read."""
    first, second = tiny.save_models(tmp_path, LLAMA, 2)
    index = json.loads((shard(second) / "model.safetensors.index.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    path = second / index["weight_map"][name]
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header[name]["dtype"] = word
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    told = f"{second} holds {name} as {word}, which is no dtype of safetensors: download it again."
    assert told in check([first, second])


def test_buffers_of_integers_are_no_quantised_weights(merged, tmp_path):
    models = tiny.save_models(tmp_path, tiny.CONFIGS["gpt2"], 2)
    for path in (model / "model.safetensors" for model in models):
        mask = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()
        save_file({**load_file(path), "transformer.h.0.attn.bias": mask}, path)
    merged(models)
