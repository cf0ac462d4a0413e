"""`base_model` as one more source, which has no data and teaches nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from commands import refusal, run
from compatibility import shows
from mergekit.options import MergeOptions
from test_merge import fitted, same, weights
from test_slices import write_slices

from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.config import read_recipe
from mergekit_dam.fit import fit
from mergekit_dam.fit.objective import Distillation
from mergekit_dam.fit.prepare import prepare

OPTIONS = MergeOptions(quiet=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tiny.save_models(tmp_path_factory.mktemp("models"), tiny.CONFIGS["llama"], 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / "base"
    return str(tiny.save_model(folder, tiny.CONFIGS["llama"], seed=99))


@shows("settings", "`base_model` that is not listed", "one more source, without data")
def test_the_fits_model_is_what_stock_mergekit_writes(recipe, models, base, tmp_path) -> None:
    path = recipe(models, base_model=base)
    logits = fitted(path, tmp_path)
    run("mergekit-yaml", path, tmp_path / "out", "--quiet")
    torch.testing.assert_close(tiny.load(tmp_path / "out")(tiny.tokens()).logits, logits)
    header = CoefficientFile(tmp_path / "dam.safetensors").header
    assert [source.teaches for source in header.sources] == [True, True, False]
    assert header.sources[-1].reference == base
    assert len(header.results.fit) == 2


@pytest.mark.parametrize("start", ["average", "least_squares"])
def test_it_starts_at_zero_and_is_trained(recipe, models, base, tmp_path, start) -> None:
    first = recipe(models, base_model=base, dam={"start": "average", "steps": 0})
    fit(read_recipe(str(first)), str(tmp_path / "a"), OPTIONS, device="cpu")
    average = CoefficientFile(tmp_path / "a")
    assert all(not average.get(name)[2].any() for name in average.names)
    assert all((average.get(name)[:2] == 0.5).all() for name in average.names)
    steps = 3 if start == "average" else 0
    path = recipe(models, base_model=base, dam={"start": start, "steps": steps})
    header = fit(read_recipe(str(path)), str(tmp_path / "b"), OPTIONS, device="cpu")
    found = CoefficientFile(tmp_path / "b")
    assert any(found.get(name)[2].any() for name in found.names)
    assert sum(f.kl for f in header.results.fit) < sum(f.kl for f in header.results.average)


@pytest.mark.parametrize(
    ("steps", "weight", "row"),
    [(0, None, [0, 0, 1]), (1, None, [0.5, 0.5, 0]), (0, 1, [0.5, 0.5, 0])],
)
def test_least_squares_alone_begins_at_the_base(recipe, models, base, steps, weight, row) -> None:
    """It ends nearer to its sources from there; a fit ends nearer from the average."""
    path = recipe(models, base_model=base, dam={"start": "least_squares", "steps": steps})
    document = yaml.safe_load(path.read_text())
    for model in document["models"]:
        model["parameters"] = {} if weight is None else {"weight": weight}
    path.write_text(yaml.safe_dump(document))
    found = prepare(read_recipe(str(path)), OPTIONS, device="cpu").merged
    for c in found.coefficients().values():
        assert torch.equal(
            c, torch.tensor(row).float().reshape(-1, *[1] * (c.dim() - 1)).expand_as(c)
        )


def test_at_its_start_it_changes_nothing(recipe, models, base, tmp_path) -> None:
    for name, keys in (("with", {"base_model": base}), ("without", {})):
        path = recipe(models, dam={"steps": 0}, **keys)
        run("mergekit-dam", "run", path, tmp_path / name, "--quiet")
    assert same(weights(tmp_path / "with"), weights(tmp_path / "without"))


@shows("settings", "`base_model` with `use_base: false`", "takes no part")
def test_it_takes_no_part_where_it_shall_not(recipe, models, base, tmp_path) -> None:
    run("mergekit-dam", "run", recipe(models), tmp_path / "without", "--quiet")
    path = recipe(models, base_model=base, dam={"use_base": False})
    run("mergekit-dam", "run", path, tmp_path / "with", "--quiet")
    assert same(weights(tmp_path / "with"), weights(tmp_path / "without"))


def test_the_terms_on_coefficients_leave_it_out(recipe, models, base) -> None:
    """At zero the direction of its coefficients, and with it their similarity, has no gradient."""
    objective = {"kl": 0.0, "similarity": 1.0, "l2": 1.0, "weighted_overlap": 1.0}
    path = recipe(models, base_model=base, dam={"objective": objective})
    merged = prepare(read_recipe(str(path)), OPTIONS, device="cpu").merged
    loss = Distillation(merged, read_recipe(str(path)).settings.objective)
    one = torch.ones(2, dtype=torch.long)
    batch = {"lengths": one, "starts": one * 0, "sources": torch.tensor([0, 1])}
    loss(input_ids=torch.ones(2, 1, dtype=torch.long), **batch)["loss"].backward()
    for coefficients in merged.trained_coefficients().values():
        assert not coefficients.grad[2].any()
        assert coefficients.grad[:2].any()


def test_a_file_without_it_is_a_start_for_a_fit_with_it(recipe, models, base, tmp_path) -> None:
    first = recipe(models, base_model=base, dam={"use_base": False})
    fit(read_recipe(str(first)), str(tmp_path / "a"), OPTIONS, device="cpu")
    path = recipe(models, base_model=base, dam={"start": str(tmp_path / "a"), "steps": 0})
    fit(read_recipe(str(path)), str(tmp_path / "b"), OPTIONS, device="cpu")
    one, two = CoefficientFile(tmp_path / "a"), CoefficientFile(tmp_path / "b")
    for name in one.names:
        assert torch.equal(one.get(name), two.get(name)[:2])
        assert not two.get(name)[2].any()


def test_the_merge_needs_it(recipe: Callable, models, base, tmp_path) -> None:
    path = recipe(models, base_model=base)
    run("mergekit-dam", "fit", path, "--quiet")
    document = yaml.safe_load(path.read_text())
    del document["base_model"]
    path.write_text(yaml.safe_dump(document))
    wanted = f"{base}, which is not the `base_model`"
    assert wanted in refusal("mergekit-dam", "merge", path, tmp_path / "out")
    stock = run("mergekit-yaml", path, tmp_path / "out", succeeds=False).stderr
    assert wanted in stock
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_layers_that_it_does_not_have(recipe, models, base, tmp_path) -> None:
    path = recipe(models)
    write_slices(path, models, [[(0, 0, 1), (1, 0, 1)], [(0, 1, 2), (1, 1, 2)]])
    document = yaml.safe_load(path.read_text()) | {"base_model": base}
    path.write_text(yaml.safe_dump(document))
    run("mergekit-dam", "run", path, tmp_path / "out", "--quiet")
    header = CoefficientFile(tmp_path / "dam.safetensors").header
    assert all(source.teaches for source in header.sources)
    document["dam"]["use_base"] = True
    path.write_text(yaml.safe_dump(document))
    refused = refusal("mergekit-dam", "check", path)
    assert "`dam.use_base: true`: the base gives no model." in refused


def test_use_base_without_a_base(recipe, models) -> None:
    message = refusal("mergekit-dam", "check", recipe(models, dam={"use_base": True}))
    assert "`dam.use_base: true`: there is no base: set `base_model`" in message
