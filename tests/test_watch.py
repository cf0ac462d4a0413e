"""Held-out figures on the way of a fit: the best coefficients are kept, a stuck fit stops."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from commands import refusal, run
from mergekit.options import MergeOptions

from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.config import read_recipe
from mergekit_dam.fit import fit, stage
from mergekit_dam.fit.resume import BEST
from mergekit_dam.fit.verdict import mean_kl

# A rate at which the held-out KL falls, and then rises and falls at random.
RESTLESS = {
    "steps": 22,
    "start": "average",
    "objective": {"temperature": 2.0},
    "schedule": "constant",
    "warmup": 0.0,
    "learning_rate": 1.0,
    "max_grad_norm": 0,
    "seed": 2,
    "evaluate_every": 2,
    "checkpoint_every": 2,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tiny.save_models(tmp_path_factory.mktemp("models"), tiny.CONFIGS["llama"], 2)


def fitted(path: Path, out: Path, *, resume: bool = False) -> CoefficientFile:
    options = MergeOptions(quiet=True)
    fit(read_recipe(str(path)), str(out), options, device="cpu", resume=resume)
    return CoefficientFile(out)


def test_a_fit_ends_with_the_best_of_its_evaluations(recipe, models, tmp_path: Path) -> None:
    results = fitted(recipe(models, dam=RESTLESS), tmp_path / "a").header.results
    curve = [sum(point.kl) / len(point.kl) for point in results.held_out]
    assert mean_kl(results.fit) == min(curve)
    unwatched = fitted(recipe(models, dam={**RESTLESS, "evaluate_every": None}), tmp_path / "u")
    assert mean_kl(results.fit) < mean_kl(unwatched.header.results.fit)
    again = recipe(models, dam={"steps": 0, "start": str(tmp_path / "a"), "seed": RESTLESS["seed"]})
    assert fitted(again, tmp_path / "b").header.results.fit == results.fit


def test_where_nothing_is_better_the_start_is_kept(recipe, models, tmp_path: Path) -> None:
    path = recipe(models, dam={**RESTLESS, "learning_rate": 30.0, "steps": 4})
    told = run("mergekit-dam", "fit", path, "--quiet", "--device", "cpu").stderr
    assert "Warning: No evaluation of the fit was better than its start, which is kept" in told
    results = CoefficientFile(tmp_path / "dam.safetensors").header.results
    assert results.fit == results.average


@pytest.mark.parametrize("every", [None, 1])
def test_no_evaluation_is_told_of_where_none_was_made(recipe, models, tmp_path, every) -> None:
    """A model merged with its copy has a KL of 0 before and after."""
    copy = Path(shutil.copytree(models[0], tmp_path / "copy"))
    dam = {"steps": 2, "evaluate_every": every}
    path = recipe([models[0], copy], dam=dam)
    told = run("mergekit-dam", "fit", path, "--quiet", "--device", "cpu").stderr
    assert ("No evaluation of the fit" in told) == bool(every)


def test_a_fit_that_gets_no_better_stops(recipe, models, tmp_path: Path) -> None:
    path = recipe(models, dam={**RESTLESS, "patience": 2})
    results = fitted(path, tmp_path / "a").header.results
    curve = [sum(point.kl) for point in results.held_out[1:]]
    assert len(curve) < 11  # steps 2, 4, ... 22
    assert results.history[-1].step == results.held_out[-1].step == 2 * len(curve)
    assert curve.index(min(curve)) == len(curve) - 3


def killed_at_the_end(path: Path, out: Path) -> Path:
    """A fit that all but wrote its file; returns the folder that it left."""

    def killed(*_) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage.files, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            fitted(path, out)
    return Path(f"{out}.fit")


@pytest.mark.parametrize("has_best", [True, False])
def test_killed_after_it_stopped_it_ends_the_same(
    recipe: Callable, models, tmp_path: Path, has_best: bool
) -> None:
    """The last checkpoint is that of the last step."""
    path = recipe(models, dam={**RESTLESS, "patience": 2})
    fitted(path, tmp_path / "whole")
    whole, broken = (tmp_path / "whole").read_bytes(), tmp_path / "broken"
    folder = killed_at_the_end(path, broken)
    if not has_best:  # a damaged file: the last checkpoint alone is left
        (folder / BEST).write_bytes(b"damaged")
    assert (folder / BEST).exists()
    resumed = fitted(path, broken, resume=True)
    if has_best:
        assert broken.read_bytes() == whole
    assert mean_kl(resumed.header.results.fit) < mean_kl(resumed.header.results.average)
    assert not folder.exists()


@pytest.mark.parametrize("every", [None, 2])
def test_killed_after_its_last_step_it_makes_no_other(recipe, models, tmp_path, every) -> None:
    path = recipe(models, dam={**RESTLESS, "evaluate_every": every})
    fitted(path, tmp_path / "whole")
    killed_at_the_end(path, tmp_path / "broken")
    resumed = fitted(path, tmp_path / "broken", resume=True)
    assert resumed.header.results.history[-1].step == RESTLESS["steps"]
    assert (tmp_path / "broken").read_bytes() == (tmp_path / "whole").read_bytes()


def test_patience_needs_evaluations(recipe, models) -> None:
    message = refusal("mergekit-dam", "check", recipe(models, dam={"patience": 2}))
    assert "`patience` counts evaluations: give `evaluate_every`, too" in message
