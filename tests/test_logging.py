"""What a fit logs by the Trainer's integrations: tensorboard's own files, read again."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from commands import refusal, run
from mergekit.options import MergeOptions
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.config import read_recipe
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.fit.trainer import integration_problems, labels

Scalars = dict[str, dict[int, float]]  # tag -> step -> value
LOGGED = {
    "report_to": ["tensorboard"],
    "objective": {"jsd": 0.5, "l1": 1e-4, "l2": 1e-4},
    "steps": 4,
    "learning_rate": 0.01,
    "schedule": "linear",
    "warmup": 0.0,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tiny.save_models(tmp_path_factory.mktemp("models"), tiny.CONFIGS["llama"], 2)


def scalars(config: Path) -> Scalars:
    result: Scalars = {}
    for folder in sorted(config.parent.glob("dam.safetensors.fit/runs/*")):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            found = {event.step: event.value for event in events.Scalars(tag)}
            result[tag] = result.get(tag, {}) | found
    return result


def test_every_term_is_in_tensorboards_files(recipe: Callable, models: list[Path]) -> None:
    config = recipe(models, dam=LOGGED)
    run("mergekit-dam", "fit", config)
    logged = scalars(config)
    every_step = {1, 2, 3, 4}
    terms = ["kl/m0", "kl/m1", "jsd/m0", "jsd/m1", "similarity", "l1", "l2"]
    for name in ("loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", *terms):
        assert logged[f"train/{name}"].keys() == every_step, name
    value = {name: logged[f"train/{name}"] for name in (*terms, "loss")}
    for step in every_step:
        total = sum(value[f"kl/{m}"][step] + 0.5 * value[f"jsd/{m}"][step] for m in ("m0", "m1"))
        total += 0.01 * value["similarity"][step] + 1e-4 * (value["l1"][step] + value["l2"][step])
        assert value["loss"][step] == pytest.approx(total, rel=1e-3)
    rates = [logged["train/learning_rate"][step] for step in sorted(every_step)]
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert all(norm > 0 for norm in logged["train/grad_norm"].values())
    assert all(speed > 0 for speed in logged["train/tokens_per_second"].values())


def test_tokens_are_those_of_the_rows(recipe: Callable, models: list[Path]) -> None:
    """An epoch reads each of them once."""
    config = recipe(models, dam={**LOGGED, "steps": None, "epochs": 1, "batch_size": 1})
    run("mergekit-dam", "fit", config)
    prepared = prepare(read_recipe(str(config)), MergeOptions(quiet=True), device="cpu")
    total = sum(len(row) for source in prepared.data for row in source.train)
    assert max(scalars(config)["train/tokens"].values()) == total


def test_logs_stay_and_do_not_stand_in_the_way_of_the_next_fit(
    recipe: Callable, models: list[Path]
) -> None:
    config = recipe(models, dam=LOGGED)
    run("mergekit-dam", "fit", config)
    first = scalars(config)["train/loss"]
    file = CoefficientFile(config.parent / "dam.safetensors").header
    run("mergekit-dam", "fit", config)
    assert len(list(config.parent.glob("dam.safetensors.fit/runs/*"))) >= 1
    assert scalars(config)["train/loss"] == first
    assert CoefficientFile(config.parent / "dam.safetensors").header == file


def test_an_unknown_integration_is_refused_early(recipe: Callable, models: list[Path]) -> None:
    config = recipe(models, dam={"report_to": ["tensorbord"]})
    message = refusal("mergekit-dam", "check", config)
    assert "`dam.report_to` has 'tensorbord', which is none of " in message
    assert "tensorboard" in message and "wandb" in message


def test_a_missing_integration_is_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_clearml_available", lambda: False)
    (message,) = integration_problems(["clearml"])
    assert message.startswith("`dam.report_to` has 'clearml', which is not installed (")
    assert message.endswith("): install it")
    assert not list(integration_problems(["none"]))


def test_sources_are_named_by_the_last_part_of_their_names() -> None:
    assert labels(["./a/math", "org/code", "base+lora/x"]) == {"1": "math", "2": "code", "3": "x"}
    assert labels(["./a/x", "./b/x/"]) == {"1": "x-1", "2": "x-2"}
