"""inspect, convert and blend: what they print is in the file, what they write merges the same."""

from pathlib import Path

import pytest
import tiny
import torch
import yaml
from commands import refusal, run
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from mergekit_dam.blend import blend
from mergekit_dam.coefficients import CoefficientFile, Header, Source, save
from mergekit_dam.config import read_recipe
from mergekit_dam.errors import DamError
from mergekit_dam.fit import fit
from mergekit_dam.summary import by_kind, by_layer, histogram, shares, statistics

QUIET = MergeOptions(quiet=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return tiny.save_models(folder, tiny.CONFIGS["qwen2"], 4)  # biases; the last is the base


def fitted(path: Path) -> CoefficientFile:
    recipe = read_recipe(str(path))
    fit(recipe, recipe.coefficients, QUIET, device="cpu")
    return CoefficientFile(recipe.coefficients)


def merged(config: Path, out: Path) -> dict[str, torch.Tensor]:
    run("mergekit-yaml", config, out, "--quiet")
    tiny.load(out)
    return load_file(out / "model.safetensors")


def made(path: Path, tensors: dict, **fields) -> CoefficientFile:
    """A file that nobody has fitted."""
    sources = tuple(Source(reference=f"./m{i}", weights=f"{i:032x}") for i in (0, 1))
    fields = {"formula": "weights", "granularity": "column", "sources": sources, **fields}
    save(path, tensors, Header(package="0.1.0", **fields))
    return CoefficientFile(path)


# ---- summary and inspect


def test_statistics_are_those_of_all_coefficients(tmp_path: Path):
    torch.manual_seed(0)
    tensors = {f"model.layers.{i}.up.weight": torch.randn(2, 1, 3 + i) for i in (0, 2, 10)}
    file = made(tmp_path / "dam.safetensors", {**tensors, "lm_head.weight": torch.ones(2, 1, 4)})
    found = statistics(file)
    assert [t.layer for t in found] == [None, 0, 2, 10]  # not 0, 10, 2
    head, up = by_kind(found)
    assert (head.name, up.name) == ("lm_head.weight", "model.layers.*.up.weight")
    together = torch.cat([t.flatten(1) for t in tensors.values()], 1)
    torch.testing.assert_close(torch.tensor(up.mean), together.mean(1))
    torch.testing.assert_close(torch.tensor(up.spread), together.std(1, correction=0))
    torch.testing.assert_close(torch.tensor(up.magnitude), together.abs().mean(1))
    assert up.shapes == ((1, 3), (1, 5), (1, 13))
    assert list(by_layer(found)) == [0, 2, 10]
    for parts in shares(by_layer(found)).values():
        assert sum(parts) == pytest.approx(1)


def test_layers_are_those_of_the_largest_stack(tmp_path: Path):
    names = [f"model.layers.{i}.{kind}.weight" for i in range(3) for kind in ("up", "down")]
    names += [f"vision.blocks.{i}.weight" for i in range(5)]
    file = made(tmp_path / "dam.safetensors", {name: torch.ones(2, 1, 1) for name in names})
    assert list(by_layer(statistics(file))) == [0, 1, 2]


@pytest.mark.parametrize("values", [torch.full((2, 1, 4), 0.5), torch.randn(2, 50, 40) * 3])
def test_histogram_counts_every_coefficient(tmp_path: Path, values):
    file = made(tmp_path / "dam.safetensors", {"a.weight": values})
    edges, parts = histogram(file, statistics(file))
    assert len(edges) == len(parts[0]) + 1
    for part in parts:
        assert sum(part) == pytest.approx(1)


def test_inspect_prints_what_the_file_holds(models, recipe):
    file = fitted(recipe(models[:3]))
    shown = run("mergekit-dam", "inspect", file.path).stdout
    for source in file.header.sources:
        assert source.reference in shown
        assert source.weights[:8] in shown
    assert "formula weights, granularity column" in shown
    (row,) = (line for line in shown.splitlines() if "layers.*.mlp.up_proj.weight" in line)
    assert "[1, 16]" in row
    up = [file.get(f"model.layers.{layer}.mlp.up_proj.weight") for layer in (0, 1)]
    for values in torch.stack(up, 1).flatten(1):
        assert f"{values.mean():.3f} ± {values.std(correction=0):.3f}" in row
    assert "KL average" in shown


def test_inspect_of_no_file():
    assert "does not exist" in refusal("mergekit-dam", "inspect", "/nowhere/dam.safetensors")


# ---- convert


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("base", [False, True])
def test_linear_config_gives_the_same_weights(models, recipe, tmp_path: Path, dtype, base):
    keys = {"base_model": str(models[-1])} if base else {}
    dam = {"granularity": "tensor", "learning_rate": 0.1}
    path = recipe(models[:3], dtype=dtype, dam=dam, **keys)
    file = fitted(path)
    assert len({v for name in file.names for v in file.get(name).flatten().tolist()}) > 50
    linear = tmp_path / "linear.yml"
    run("mergekit-dam", "convert", file.path, linear)
    assert yaml.safe_load(linear.read_text())["merge_method"] == "linear"
    ours, plain = merged(path, tmp_path / "ours"), merged(linear, tmp_path / "plain")
    assert ours.keys() == plain.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, plain[name]), name


def test_linear_config_of_task_vectors(models, recipe, tmp_path: Path):
    dam = {"granularity": "tensor", "learning_rate": 0.1, "formula": "task_vectors"}
    path = recipe(models[:3], base_model=str(models[-1]), dam=dam)
    file = fitted(path)
    linear = tmp_path / "linear.yml"
    run("mergekit-dam", "convert", file.path, linear)
    ours, plain = merged(path, tmp_path / "ours"), merged(linear, tmp_path / "plain")
    for name, tensor in ours.items():
        torch.testing.assert_close(plain[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_there_and_back(models, recipe, tmp_path: Path):
    file = fitted(recipe(models[:2], dam={"granularity": "tensor", "learning_rate": 0.1}))
    linear, back = tmp_path / "linear.yml", tmp_path / "back.safetensors"
    run("mergekit-dam", "convert", file.path, linear)
    run("mergekit-dam", "convert", linear, back)
    again = CoefficientFile(back)
    assert again.names == file.names
    assert again.header.sources == file.header.sources
    for name in file.names:
        assert torch.equal(again.get(name), file.get(name)), name


GRADIENT = {"weight": [0.2, 0.9]}
FILTER = {"weight": [{"filter": "mlp", "value": 0.3}, {"value": 0.6}]}


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_config_becomes_a_file_with_the_same_merge(models, tmp_path: Path, method, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = {
        "merge_method": method,
        "models": [
            {"model": str(model), "parameters": parameters}
            for model, parameters in zip(models, (GRADIENT, FILTER), strict=False)
        ],
        "base_model": str(models[-1]),
        "parameters": {"weight": 0.25, **({"density": 0.5} if method == "ties" else {})},
        "dtype": "float32",
    }
    stock = tmp_path / "stock.yml"
    stock.write_text(yaml.safe_dump(document))
    run("mergekit-dam", "convert", stock, "dam.safetensors")
    header = CoefficientFile("dam.safetensors").header
    assert header.origin == f"a config of {method}"
    assert len(header.sources) == (3 if method == "linear" else 2)  # linear counts the base
    sources = [{"model": source.reference} for source in header.sources]
    parameters = {"coefficients": "dam.safetensors"}
    document |= {"merge_method": "dam", "models": sources, "parameters": parameters}
    ours = tmp_path / "ours.yml"
    ours.write_text(yaml.safe_dump(document))
    expected = merged(stock, tmp_path / "stock")
    for name, tensor in merged(ours, tmp_path / "ours").items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=5e-7, msg=name)


@pytest.mark.parametrize("case", ["an aligned vocabulary", "a base that is listed"])
def test_what_convert_writes_is_what_merge_reads(models, tmp_path: Path, case, monkeypatch):
    """`mergekit-dam merge`, which compares more than mergekit's own command; no `dam:` block."""
    monkeypatch.chdir(tmp_path)
    sources = [{"model": str(m), "parameters": {"weight": 0.5}} for m in models[:2]]
    base = str(models[2])
    if case == "an aligned vocabulary":
        document = {"merge_method": "linear", "models": sources, "tokenizer_source": "union"}
        merge = {"models": [{"model": str(m)} for m in models[:2]], "tokenizer_source": "union"}
    else:
        sources = [{"model": base}, *sources]
        document = {"merge_method": "task_arithmetic", "base_model": base, "models": sources}
        merge = {"base_model": base, "models": [{"model": entry["model"]} for entry in sources]}
    Path("theirs.yml").write_text(yaml.safe_dump(document | {"dtype": "float32"}))
    run("mergekit-dam", "convert", "theirs.yml", "dam.safetensors")
    merge |= {"merge_method": "dam", "parameters": {"coefficients": "dam.safetensors"}}
    Path("ours.yml").write_text(yaml.safe_dump(merge | {"dtype": "float32"}))
    run("mergekit-dam", "merge", "ours.yml", "ours", "--quiet")
    expected = merged(Path("theirs.yml"), Path("theirs"))
    for name, tensor in load_file("ours/model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=5e-7, msg=name)


def test_what_linear_cannot_say_is_refused(models, recipe, tmp_path: Path):
    column = fitted(recipe(models[:2], dam={"learning_rate": 0.1}))
    out = tmp_path / "linear.yml"
    assert "several coefficients for each source" in refusal(
        "mergekit-dam", "convert", column.path, out
    )
    tensors = {"model.norm.weight": torch.ones(2, 1)}
    sliced = made(tmp_path / "sliced.safetensors", tensors, merge={"slices": []})
    assert "`slices`" in refusal("mergekit-dam", "convert", sliced.path, out)
    assert not out.exists()


def test_nothing_is_overwritten_by_convert(models, recipe, tmp_path: Path):
    config = recipe(models[:2])
    text = config.read_text()
    made(tmp_path / "a.safetensors", {"model.norm.weight": torch.ones(2, 1)})
    message = refusal("mergekit-dam", "convert", tmp_path / "a.safetensors", config)
    assert "is there already" in message
    assert config.read_text() == text


def test_config_of_another_method(models, tmp_path: Path):
    path = tmp_path / "slerp.yml"
    path.write_text(f"merge_method: slerp\nmodels: [{{model: {models[0]}}}]\n")
    message = refusal("mergekit-dam", "convert", path, tmp_path / "dam.safetensors")
    assert "merge_method is 'slerp'" in message


# ---- blend


def two_files(folder: Path) -> list[CoefficientFile]:
    """Of the same two sources in different order."""
    torch.manual_seed(0)
    sources = [Source(reference=f"./m{i}", weights=f"{i:032x}") for i in (0, 1)]
    return [
        made(folder / f"{name}.safetensors", {"a.weight": torch.randn(2, 1, 4)}, sources=order)
        for name, order in (("a", tuple(sources)), ("b", tuple(reversed(sources))))
    ]


@pytest.mark.parametrize("weight", ["nan", "1e40"])
def test_a_sum_that_is_no_number_is_not_written(tmp_path: Path, weight: str):
    (a, _), out = two_files(tmp_path), tmp_path / "out.safetensors"
    message = refusal("mergekit-dam", "blend", a.path, "--weight", weight, "--out", out)
    assert "is no finite number: give other weights" in message
    assert not out.exists()


def test_blend_adds_up_by_source(tmp_path: Path):
    a, b = two_files(tmp_path)
    out = tmp_path / "c.safetensors"
    run("mergekit-dam", "blend", a.path, b.path, "--weight", 0.7, "--weight", 0.3, "--out", out)
    file = CoefficientFile(out)
    expected = 0.7 * a.get("a.weight") + 0.3 * b.get("a.weight").flip(0)
    torch.testing.assert_close(file.get("a.weight"), expected)
    assert file.header.sources == a.header.sources
    assert file.header.results is None
    assert file.header.origin.startswith("blend of 0.7 × ")


def test_blend_is_the_mean_and_scales(tmp_path: Path):
    a, b = two_files(tmp_path)
    run("mergekit-dam", "blend", a.path, b.path, "--out", tmp_path / "mean.safetensors")
    mean = (a.get("a.weight") + b.get("a.weight").flip(0)) / 2
    torch.testing.assert_close(CoefficientFile(tmp_path / "mean.safetensors").get("a.weight"), mean)
    scaled = tmp_path / "scaled.safetensors"
    run("mergekit-dam", "blend", a.path, "--weight", 1.1, "--out", scaled)
    torch.testing.assert_close(CoefficientFile(scaled).get("a.weight"), 1.1 * a.get("a.weight"))


def test_a_blend_of_fits_merges(models, recipe, tmp_path: Path):
    path = recipe(models[:2], dam={"steps": 2, "learning_rate": 0.1})
    first = Path(fitted(path).path).rename(tmp_path / "first.safetensors")
    tensor = fitted(recipe(models[:2], dam={"steps": 2, "granularity": "tensor"}))
    second = Path(tensor.path).rename(tmp_path / "second.safetensors")
    run("mergekit-dam", "blend", first, second, "--out", tmp_path / "dam.safetensors")
    assert CoefficientFile(tmp_path / "dam.safetensors").header.granularity == "mixed"
    run("mergekit-dam", "merge", path, tmp_path / "out", "--quiet")
    tiny.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"sources": tuple(Source(reference=n, weights=n) for n in "xy")}, "other sources"),
        ({"tensors": {"b.weight": torch.ones(2, 1, 4)}}, "set of tensors"),
        ({"formula": "task_vectors", "base": Source(reference="b", weights="b")}, "formula"),
        ({"tensors": {"a.weight": torch.ones(2, 3, 1)}}, "of which none holds the others"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path: Path, other: dict, what: str):
    a = made(tmp_path / "a.safetensors", {"a.weight": torch.ones(2, 1, 4)})
    fields = {key: value for key, value in other.items() if key != "tensors"}
    tensors = other.get("tensors", {"a.weight": torch.ones(2, 1, 4)})
    b = made(tmp_path / "b.safetensors", tensors, **fields)
    with pytest.raises(DamError) as caught:
        blend([a, b], [0.5, 0.5])
    assert what in caught.value.message


def test_weights_that_do_not_match_the_files(tmp_path: Path):
    a, b = two_files(tmp_path)
    command = ("mergekit-dam", "blend", a.path, b.path, "--out", tmp_path / "c")
    assert "1 weights for 2 files" in refusal(*command, "--weight", 1)
