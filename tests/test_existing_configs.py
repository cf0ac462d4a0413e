"""Configs of mergekit's own methods in which the method's name, and no parameter, changes."""

from pathlib import Path

import pytest
import tiny
import torch
import yaml
from commands import refusal, run
from compatibility import shows
from mergekit import merge_methods
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.config import read_recipe
from mergekit_dam.fit import fit
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.method import dam
from mergekit_dam.task_vectors import METHODS

QUIET = MergeOptions(quiet=True)
DETERMINISTIC = ("task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties")
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
SCALAR = [0.6, 0.3, 0.4]
GRADIENT = [[0.1, 0.9], [0.5, 0.2, 0.3], [0.4, 0.4]]
FILTER = [
    [{"filter": "mlp", "value": [0.2, 0.8]}, {"filter": "self_attn", "value": 0.7}, {"value": 0.4}],
    [{"filter": "norm", "value": 1.0}, {"value": 0.3}],
    0.5,
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return tiny.save_models(folder, tiny.CONFIGS["llama"], 4)  # the last is the base


def both(recipe, models, method: str, parameters: list[dict], shared: dict, **dam) -> Path:
    """The recipe for dam; beside it stock.yml, the same for mergekit's own method."""
    base, sources = models[-1], models[:-1]
    path = recipe(sources, base_model=str(base), dam={"steps": 0, **dam})
    document = yaml.safe_load(path.read_text())
    for model, own in zip(document["models"], parameters, strict=True):
        model["parameters"] = own
    document["parameters"].update(shared)
    path.write_text(yaml.safe_dump(document))
    document["merge_method"] = method
    del document["parameters"]["coefficients"], document["dam"]
    if method == "linear":  # mergekit's linear would count the base as a source
        del document["base_model"]
    (path.parent / "stock.yml").write_text(yaml.safe_dump(document))
    return path


def in_dtype(path: Path, dtype: str) -> Path:
    """The same recipe, and mergekit's beside it, merged in another dtype."""
    for file in (path, path.parent / "stock.yml"):
        document = yaml.safe_load(file.read_text()) | {"dtype": dtype}
        file.write_text(yaml.safe_dump(document))
    return path


def merged(path: Path, tmp_path: Path) -> tuple[dict, dict]:
    """The tensors of the merge by dam, and of mergekit's own."""
    run("mergekit-dam", "run", path, tmp_path / "dam", "--quiet")
    run("mergekit-yaml", path.parent / "stock.yml", tmp_path / "stock", "--quiet")
    ours, stock = (load_file(tmp_path / n / "model.safetensors") for n in ("dam", "stock"))
    assert ours.keys() == stock.keys()
    return ours, stock


def assert_same_merge(path: Path, tmp_path: Path) -> None:
    ours, stock = merged(path, tmp_path)
    for name, tensor in stock.items():
        torch.testing.assert_close(ours[name], tensor, rtol=2e-6, atol=5e-7, msg=name)


@pytest.mark.parametrize("weights", [SCALAR, GRADIENT, FILTER], ids=["scalar", "list", "filter"])
@pytest.mark.parametrize("normalize", [None, False])
def test_linear(recipe, models, tmp_path, weights, normalize):
    shared = {} if normalize is None else {"normalize": normalize}
    path = both(recipe, models, "linear", [{"weight": w} for w in weights], shared)
    assert_same_merge(path, tmp_path)


CASES = {
    "task_arithmetic": ({}, {"lambda": 0.7}),
    "ties": ({"density": 0.5}, {}),
    "breadcrumbs": ({"density": 0.6, "gamma": 0.05}, {"lambda": 1.3}),
    "breadcrumbs_ties": ({"density": 0.6, "gamma": 0.05}, {"normalize": True}),
    "dare_linear": ({"density": 1.0}, {"rescale": True}),
    "dare_ties": ({"density": 1.0}, {}),
    "della": ({"density": 1.0, "epsilon": 0.1}, {}),
    "della_linear": ({"density": 1.0}, {"normalize": True}),
}


@pytest.mark.parametrize("weights", [SCALAR, GRADIENT, FILTER], ids=["scalar", "list", "filter"])
@pytest.mark.parametrize("method", CASES)
def test_task_vectors(recipe, models, tmp_path, method, weights):
    """Without training the merge is mergekit's own; random masks have nothing to draw here."""
    own, shared = CASES[method]
    parameters = [{"weight": weight, **own} for weight in weights]
    settings = {"formula": "task_vectors", "sparsify": method}
    assert_same_merge(both(recipe, models, method, parameters, shared, **settings), tmp_path)


# mergekit divides by the weights' sum and multiplies by lambda after it has summed up; here both
# are in the coefficients. Without them there is nothing to round differently.
AS_IT_IS = {
    "linear": {"normalize": False},
    "task_arithmetic": {},
    "ties": {"normalize": False},
    "breadcrumbs": {},
    "breadcrumbs_ties": {},
    "dare_linear": {},
    "dare_ties": {},
    "della": {"normalize": False},
    "della_linear": {},
}


@pytest.mark.parametrize("weights", [SCALAR, GRADIENT, FILTER], ids=["scalar", "list", "filter"])
@pytest.mark.parametrize("method", AS_IT_IS)
def test_in_float32_the_start_is_mergekits_merge_bit_for_bit(
    recipe, models, tmp_path, method, weights
):
    own, _ = CASES.get(method, ({}, {}))
    parameters = [{"weight": weight, **own} for weight in weights]
    settings = {"formula": "task_vectors", "sparsify": method} if method in CASES else {}
    path = both(recipe, models, method, parameters, AS_IT_IS[method], **settings)
    ours, stock = merged(path, tmp_path)
    assert all(torch.equal(ours[name], tensor) for name, tensor in stock.items())


@pytest.mark.parametrize(
    ("dtype", "method"),
    [("float16", "ties"), *(("bfloat16", method) for method in ("linear", *DETERMINISTIC))],
)
def test_in_half_precision_the_start_is_nearer_to_the_exact_merge_than_mergekits(
    recipe, models, tmp_path, method, dtype
):
    """mergekit sums task vectors up in the models' dtype; the formula does in float32."""
    own, shared = CASES.get(method, ({}, {}))
    parameters = [{"weight": weight, **own} for weight in SCALAR]
    settings = {"formula": "task_vectors", "sparsify": method} if method in CASES else {}
    halves = [tiny.cast(m, tmp_path / m.name, getattr(torch, dtype)) for m in models]
    path = both(recipe, halves, method, parameters, shared, **settings)
    ours, stock = merged(in_dtype(path, dtype), tmp_path)
    _, exact = merged(in_dtype(path, "float64"), tmp_path / "exact")

    def error(tensors: dict, name: str) -> float:
        return (tensors[name] - exact[name]).abs().mean().item()

    for name in exact:
        assert error(ours, name) <= error(stock, name) * (1 + 1e-9), name


@pytest.mark.parametrize("shared", [{"rescale": True}, {"normalize": False}, {"int8_mask": True}])
def test_switches_of_ties(recipe, models, tmp_path, shared):
    parameters = [{"weight": weight, "density": 0.4} for weight in SCALAR]
    settings = {"formula": "task_vectors", "sparsify": "ties"}
    assert_same_merge(both(recipe, models, "ties", parameters, shared, **settings), tmp_path)


@pytest.mark.parametrize("method", RANDOM)
def test_random_masks_are_the_same_in_fit_and_merge(recipe, models, tmp_path, method):
    parameters = [{"weight": weight, "density": 0.5} for weight in SCALAR]
    settings = {"formula": "task_vectors", "sparsify": method, "steps": 2}
    path = both(recipe, models, method, parameters, {}, **settings)
    read = read_recipe(str(path))
    fit(read, read.coefficients, QUIET, device="cpu")
    torch.manual_seed(123)  # the merge's own state must not matter
    run("mergekit-yaml", path, tmp_path / "out", "--quiet", "--random-seed", 5)
    prepared, file = prepare(read, QUIET, device="cpu"), CoefficientFile(read.coefficients)
    with torch.no_grad():
        for name, coefficient in prepared.merged.coefficients().items():
            coefficient.copy_(file.get(name))
    ids = tiny.tokens()
    torch.testing.assert_close(tiny.load(tmp_path / "out")(ids).logits, prepared.merged(ids))
    name = "model.layers.0.mlp.up_proj.weight"
    kept = [(part != 0).float().mean() for part in prepared.merged._weights[name].load().prepared]
    assert all(0.1 < share < 0.9 for share in kept)


def test_the_file_decides_what_is_prepared(recipe, models, tmp_path):
    """A density that was changed after the fit does not change the merge."""
    parameters = [{"weight": weight, "density": 0.5} for weight in SCALAR]
    settings = {"formula": "task_vectors", "sparsify": "ties"}
    path = both(recipe, models, "ties", parameters, {}, **settings)
    run("mergekit-dam", "run", path, tmp_path / "before", "--quiet")
    path.write_text(path.read_text().replace("density: 0.5", "density: 0.9"))
    run("mergekit-yaml", path, tmp_path / "after", "--quiet")
    name = "model.safetensors"
    assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_training_goes_on_from_there(recipe, models, tmp_path):
    parameters = [{"weight": weight, "density": 0.5} for weight in SCALAR]
    settings = {"formula": "task_vectors", "sparsify": "ties", "steps": 5}
    path = both(recipe, models, "ties", parameters, {}, **settings)
    header = fit(read_recipe(str(path)), str(tmp_path / "a.safetensors"), QUIET, device="cpu")
    start = prepare(read_recipe(str(path)), QUIET, device="cpu").merged.coefficients()
    file = CoefficientFile(tmp_path / "a.safetensors")
    assert header.preparation.method == "ties"
    assert all(not torch.equal(file.get(name), c.detach()) for name, c in start.items())


WITHOUT_EFFECT = ("density", "gamma", "epsilon", "rescale", "int8_mask")


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_a_parameter_without_effect_is_named(recipe, models, tmp_path, name):
    own = [{"weight": weight, "density": 0.5} for weight in SCALAR] if name == "density" else None
    shared = {} if name == "density" else {name: 0.1 if name in ("gamma", "epsilon") else True}
    path = both(recipe, models, "ties", own or [{}] * 3, shared)
    message = refusal("mergekit-dam", "check", path)
    assert f"`{name}` has no effect" in message
    assert "dam.sparsify" in message


def test_weights_for_some_sources_only(recipe, models):
    path = both(recipe, models, "linear", [{"weight": 1.0}, {}, {"weight": 0.5}], {})
    assert str(models[1]) in refusal("mergekit-dam", "fit", path)


def test_sparsify_needs_task_vectors(recipe, models):
    path = recipe(models[:-1], dam={"sparsify": "ties"})
    assert "task_vectors" in refusal("mergekit-dam", "check", path)


RULES = [
    {"filter": "embed_tokens", "value": "tensor"},
    {"filter": "mlp", "value": "row"},
    {"filter": "norm", "value": "element"},
    {"value": "column"},
]


@shows("settings", "`dam.granularity` by filter", "in the manner of mergekit's parameters")
def test_granularity_by_filter(recipe, models, tmp_path):
    path = recipe(models, dam={"granularity": RULES})
    read = read_recipe(str(path))
    fit(read, read.coefficients, QUIET, device="cpu")
    file = CoefficientFile(read.coefficients)
    shapes = {
        "model.embed_tokens.weight": (4, 1, 1),
        "model.layers.0.mlp.up_proj.weight": (4, 24, 1),
        "model.layers.1.input_layernorm.weight": (4, 16),
        "model.layers.1.self_attn.q_proj.weight": (4, 1, 16),
    }
    assert {name: file.shape(name) for name in shapes} == shapes
    run("mergekit-dam", "merge", path, tmp_path / "out", "--quiet")
    prepared = prepare(read, QUIET, device="cpu")
    with torch.no_grad():
        for name, coefficient in prepared.merged.coefficients().items():
            coefficient.copy_(file.get(name))
    ids = tiny.tokens()
    torch.testing.assert_close(tiny.load(tmp_path / "out")(ids).logits, prepared.merged(ids))


def table_rows() -> list[tuple[str, str, str, str]]:
    """The lines of docs/compatibility.md about configs: the methods that are tested above, with
    the parameters that mergekit knows for them."""
    rows = []
    for method in ("linear", *CASES):
        names = [parameter.name for parameter in merge_methods.get(method).spec.parameters]
        if method == "task_arithmetic":  # which sparsifies nothing: see `WITHOUT_EFFECT`
            names = [name for name in names if name not in WITHOUT_EFFECT]
        names.sort(key=[p.name for p in dam.spec.parameters].index)
        formula = "task_vectors" if method in CASES else "weights"
        sparsify = f"`{method}`" if method in CASES and method != "task_arithmetic" else ""
        listed = ", ".join(f"`{name}`" for name in names)
        rows.append((f"`{method}`", f"`{formula}`", sparsify, listed))
    return rows


def test_every_method_of_task_vectors_is_tested():
    assert set(CASES) == set(METHODS)
