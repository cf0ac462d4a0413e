"""A fit that ends worse than it began says so."""

from pathlib import Path

import pytest
import tiny
import yaml
from commands import run
from mergekit.options import MergeOptions

from mergekit_dam.coefficients import Figures
from mergekit_dam.config import read_recipe
from mergekit_dam.fit import verdict
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.fit.verdict import at_start, warn_if_kept, warn_if_worse

SENTENCE = "Warning: The fit ends farther from its sources than it began"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    return tiny.save_models(tmp_path_factory.mktemp("models"), tiny.CONFIGS["llama"], 2)


@pytest.mark.parametrize(("rate", "is_worse"), [(0.01, False), (3.0, True)])
def test_against_the_average(recipe, models, rate, is_worse):
    path = recipe(models, dam={"steps": 8, "learning_rate": rate, "max_grad_norm": 0})
    told = run("mergekit-dam", "fit", path, "--quiet", "--device", "cpu").stderr
    assert (SENTENCE in told) == is_worse
    assert ("`dam.learning_rate`" in told) == is_worse


def test_the_start_is_not_told_to_be_worse_than_the_average(recipe, models):
    """Without steps there is no fit to judge."""
    path = recipe(models, dam={"steps": 0})
    document = yaml.safe_load(path.read_text())
    for model, weight in zip(document["models"], (0.1, 0.9), strict=True):
        model["parameters"] = {"weight": weight}
    path.write_text(yaml.safe_dump(document))
    assert SENTENCE not in run("mergekit-dam", "fit", path, "--quiet", "--device", "cpu").stderr


def figures_of(*kls: float) -> tuple[Figures, ...]:
    return tuple(Figures(tokens=1, kl=kl, perplexity=2.0, source_perplexity=2.0) for kl in kls)


def test_means_over_the_sources_are_compared(monkeypatch):
    told = []
    monkeypatch.setattr(verdict.LOG, "warning", lambda text, *values: told.append(text % values))
    warn_if_worse(figures_of(1.0, 2.0), figures_of(2.5, 0.4))
    assert not told
    warn_if_worse(figures_of(1.0, 2.0), figures_of(0.1, 3.0))
    assert "1.5500, 1.5000 at the start" in told.pop()
    warn_if_worse(figures_of(1.0, 2.0), figures_of(1.0, 2.0))
    warn_if_kept(figures_of(1.0, 2.0), figures_of(0.5, 2.0))
    assert not told
    warn_if_kept(figures_of(1.0, 2.0), figures_of(1.0, 2.0))
    assert "its start, which is kept" in told.pop()


def test_of_sparsified_task_vectors_equal_parts_are_not_the_average(recipe, models):
    shared = {"coefficients": "none.safetensors", "density": 0.3}
    dam = {"formula": "task_vectors", "sparsify": "ties", "start": "average"}
    path = recipe(models[1:], base_model=str(models[0]), parameters=shared, dam=dam)
    merged = prepare(read_recipe(str(path)), MergeOptions(quiet=True), device="cpu").merged
    average, own = figures_of(1.0), figures_of(2.0)
    assert at_start(merged, average, lambda: own) is own


@pytest.mark.parametrize(
    ("weights", "is_average"),
    [((1, 1), True), ((3, 3), True), ((1, 0), False), ((0.4, 0.6), False)],
)
def test_the_average_is_not_evaluated_twice(recipe, models, weights, is_average):
    """A source of weight 0 is none that lacks the tensors."""
    path = recipe(models, base_model=str(models[0]))
    document = yaml.safe_load(path.read_text())
    for model, weight in zip(document["models"], weights, strict=True):
        model["parameters"] = {"weight": weight}
    path.write_text(yaml.safe_dump(document))
    merged = prepare(read_recipe(str(path)), MergeOptions(quiet=True), device="cpu").merged
    average, own = figures_of(1.0), figures_of(2.0)
    assert at_start(merged, average, lambda: own) is (average if is_average else own)
