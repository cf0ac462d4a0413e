"""Merges whose layers are not one source's: cut out, repeated, stacked."""

from pathlib import Path

import pytest
import tiny
import torch
import transformers
import yaml
from commands import refusal, run
from compatibility import shows
from mergekit.options import MergeOptions

from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.config import read_recipe
from mergekit_dam.fit import fit
from mergekit_dam.fit.forecast import own_models
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.headers import HeaderShapes

QUIET = MergeOptions(quiet=True)
CONFIG = transformers.LlamaConfig(**{**tiny.SIZES, "num_hidden_layers": 4})


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    return tiny.save_models(tmp_path_factory.mktemp("models"), CONFIG, 2)


def write_slices(path: Path, models: list[Path], ranges: list[list[tuple[int, int, int]]]) -> Path:
    """Turn a recipe into slices: for each, (number of the model, first layer, end)."""
    document = yaml.safe_load(path.read_text())
    del document["models"]
    document["slices"] = [
        {"sources": [{"model": str(models[m]), "layer_range": [a, b]} for m, a, b in piece]}
        for piece in ranges
    ]
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


LAYOUTS = {
    "identity": [[(0, 0, 4), (1, 0, 4)]],
    "cut out": [[(0, 0, 1), (1, 0, 1)], [(0, 3, 4), (1, 3, 4)]],
    "repeated": [[(0, 0, 3), (1, 0, 3)], [(0, 1, 4), (1, 1, 4)]],
    "stacked": [[(0, 0, 2)], [(0, 1, 3), (1, 1, 3)], [(1, 2, 4)]],
}


@shows("settings", f"`slices`: {', '.join(LAYOUTS)}", "each source teaches as its whole model")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_slices_merge_is_fitted_and_merged(recipe, models, tmp_path, layout):
    path = write_slices(recipe(models), models, LAYOUTS[layout])
    read = read_recipe(str(path))
    fit(read, read.coefficients, QUIET, device="cpu")
    prepared, file = prepare(read, QUIET, device="cpu"), CoefficientFile(read.coefficients)
    teachers = prepared.merged._teachers.values()
    held = sum(t._weights[name].source(0).nbytes for t in teachers for name in t._weights.names())
    assert own_models(prepared.plan, HeaderShapes(prepared.plan)) == held
    ids = tiny.tokens()
    for number, folder in enumerate(models):  # whatever the merge, a teacher is its whole model
        expected = tiny.load(folder)(ids).logits
        torch.testing.assert_close(tiny.teach(prepared.merged, number, ids), expected)
    with torch.no_grad():
        for name, coefficient in prepared.merged.coefficients().items():
            coefficient.copy_(file.get(name))
    run("mergekit-yaml", path, tmp_path / "out", "--quiet")
    merged = tiny.load(tmp_path / "out")
    assert merged.config.num_hidden_layers == sum(s[0][2] - s[0][1] for s in LAYOUTS[layout])
    torch.testing.assert_close(merged(ids).logits, prepared.merged(ids))


def test_slices_of_different_length_are_refused(recipe, models):
    path = write_slices(recipe(models), models, [[(0, 0, 4), (1, 0, 3)]])
    assert "same number of layers" in refusal("mergekit-dam", "check", path)


def test_layers_that_do_not_exist_are_refused(recipe, models):
    path = write_slices(recipe(models), models, [[(0, 0, 6), (1, 0, 6)]])
    assert "model.layers.4" in refusal("mergekit-dam", "check", path)
