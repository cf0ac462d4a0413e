"""Mistakes that earlier went unseen, or ended in another library's words."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import yaml
from commands import refusal, run
from test_slices import write_slices


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tiny.save_models(tmp_path_factory.mktemp("models"), tiny.CONFIGS["llama"], 3)


def changed(path: Path, change: Callable[[dict], object]) -> Path:
    document = yaml.safe_load(path.read_text())
    change(document)
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


@pytest.mark.parametrize("layers", [(2, 0), (1, 1), (-1, 2)])
def test_layers_in_the_wrong_order(recipe, models, layers) -> None:
    path = write_slices(recipe(models[:2]), models, [[(0, 0, 2), (1, *layers)]])
    message = refusal("mergekit-dam", "check", path)
    assert f"`slices.0.sources.1.layer_range` is {list(layers)}: give the first layer" in message


@pytest.mark.parametrize("value", ["a", [0.1, "b"], [{"filter": "mlp", "value": "c"}]])
def test_a_weight_that_is_no_number(recipe, models, value) -> None:
    path = changed(
        recipe(models[:2]), lambda d: d["models"][0].update(parameters={"weight": value})
    )
    message = refusal("mergekit-dam", "check", path)
    assert "which is no finite number: give one" in message
    assert "pydantic" not in message


def test_a_weight_in_scientific_notation(recipe, models) -> None:
    def change(document: dict) -> None:
        for model in document["models"]:
            model["parameters"] = {"weight": "1e-1"}

    run("mergekit-dam", "check", changed(recipe(models[:2]), change))


def test_a_folder_that_is_not_there(recipe, models) -> None:
    path = changed(recipe(models[:2]), lambda d: d["models"].append({"model": "./missing"}))
    message = refusal("mergekit-dam", "check", path)
    assert "The model ./missing cannot be opened (there is no such folder)" in message


def test_rows_are_read_beside_other_mistakes(recipe, models, tmp_path) -> None:
    path = recipe(models[:2])
    (tmp_path / "data0.jsonl").unlink()
    (tmp_path / "data1.jsonl").write_text('{"words": "abc"}\n')
    message = refusal("mergekit-dam", "check", path)
    assert "has 2 mistakes" in message
    assert message.count("data0.jsonl") == 1
    assert "words" in message


def test_a_folder_where_the_checkpoints_would_be(recipe, models, tmp_path) -> None:
    (tmp_path / "dam.safetensors.fit").mkdir()
    (tmp_path / "dam.safetensors.fit" / "mine").touch()
    path = recipe(models[:2])
    for command in ("check", "fit"):
        assert "holds no fit's checkpoints" in refusal("mergekit-dam", command, path)


def test_an_output_under_a_file_is_refused_before_the_fit(recipe, models, tmp_path) -> None:
    (tmp_path / "file").touch()
    message = refusal("mergekit-dam", "run", recipe(models[:2]), tmp_path / "file" / "out")
    assert f"cannot be written, since {tmp_path / 'file'} is a file" in message
    assert not (tmp_path / "dam.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokenizer": {"source": "union"}}, "was fitted with `tokenizer: None`"),
        ({"granularity": "tensor"}, "was fitted with `granularity: column`, not tensor"),
    ],
)
def test_a_file_of_another_setting(recipe, models, tmp_path, change, told) -> None:
    path = recipe(models[:2])
    run("mergekit-dam", "fit", path, "--quiet")

    def change_it(document: dict) -> None:
        (document if "tokenizer" in change else document["dam"]).update(change)

    message = refusal("mergekit-dam", "merge", changed(path, change_it), tmp_path / "out")
    assert told in message
    outlook = run("mergekit-dam", "check", path)  # of another fit, which replaces the file
    assert told in outlook.stderr
    assert "trained coefficients" in outlook.stdout


def test_a_base_that_becomes_a_source(recipe, models, tmp_path) -> None:
    """The file has no coefficients of it."""
    path = recipe(models[:2], base_model=str(models[2]), dam={"use_base": False})
    run("mergekit-dam", "fit", path, "--quiet")
    changed(path, lambda d: d["models"].append({"model": str(models[2])}))
    message = refusal("mergekit-dam", "merge", path, tmp_path / "out")
    assert f"{models[2]} is not one of them" in message


@pytest.mark.parametrize("command", ["check", "fit"])
def test_a_folder_that_is_yet_to_be(recipe, models, tmp_path, command) -> None:
    where = f"{tmp_path / 'new'}/"
    path = recipe(models[:2], parameters={"coefficients": where})
    assert f"{where} is a folder" in refusal("mergekit-dam", command, path)
    assert not Path(where).exists()


def test_a_fit_that_would_start_from_what_it_writes(recipe, models, tmp_path) -> None:
    path = recipe(models[:2])
    run("mergekit-dam", "fit", path, "--quiet")
    own = {"start": str(tmp_path / "dam.safetensors")}
    message = refusal("mergekit-dam", "fit", changed(path, lambda d: d["dam"].update(own)))
    assert "dam.safetensors, which the fit writes itself" in message


TIES = {"formula": "task_vectors", "sparsify": "ties"}


@pytest.mark.parametrize(
    ("dam", "parameters", "told"),
    [
        (TIES, {"gamma": 0.1}, "`gamma` has no effect"),
        (TIES, {"epsilon": 0.1}, "`epsilon` has no effect"),
        (TIES, {"density": 5}, "`density` is 5"),
        ({**TIES, "sparsify": "dare_linear"}, {"density": 0}, "`density` is 0"),
        ({**TIES, "sparsify": "della"}, {"density": 0.1, "epsilon": 0.5}, "`epsilon` is 0.5 at"),
        ({**TIES, "sparsify": "breadcrumbs"}, {"gamma": 1.5}, "`gamma` is 1.5"),
        ({}, {"weight": float("nan")}, "`weight` is nan, which is no finite number"),
        ({}, {"weight": float("inf")}, "`weight` is inf, which is no finite number"),
        (TIES, {"normalize": "yes please"}, "`normalize` is 'yes please'"),
        ({"objective": {"kl": 0, "l2": 1}}, {}, "has no term that looks at predictions"),
    ],
    ids=str,
)
def test_numbers_that_mean_nothing(recipe, models, tmp_path, dam, parameters, told) -> None:
    shared = {"coefficients": str(tmp_path / "dam.safetensors"), **parameters}
    path = recipe(models[:2], base_model=str(models[2]), parameters=shared, dam=dam)
    message = refusal("mergekit-dam", "check", path)
    assert told in message
    assert "pydantic" not in message


def test_a_filter_without_a_tensor(recipe, models, tmp_path) -> None:
    weight = [{"filter": "mlpp", "value": 1}, {"filter": "mlp", "value": 1}, {"value": 0.5}]

    def weigh(document: dict) -> None:
        for model in document["models"]:
            model["parameters"] = {"weight": weight}

    path = changed(recipe(models[:2]), weigh)
    told = run("mergekit-dam", "check", path).stderr
    expected = "Warning: `weight` has the filter 'mlpp', which no tensor's name has in it."
    assert told.count(expected) == 1
    assert "'mlp'" not in told


def test_settings_without_an_effect(recipe, models) -> None:
    objective = {"kl": 0, "mse": 1, "temperature": 2}
    vectors = {"formula": "task_vectors", "basis": "coefficients", "objective": objective}
    dam = {**vectors, "start": "average", "calibration": 8}
    told = run("mergekit-dam", "check", recipe(models[:2], base_model=str(models[2]), dam=dam))
    for sentence in (
        "`dam.basis` has no effect on `formula: task_vectors`.",
        "`dam.calibration` has no effect on `start: average`.",
        "`dam.objective.temperature` has no effect without one of `kl`, `reverse_kl`",
    ):
        assert told.stderr.count(f"Warning: {sentence}") == 1
    halves = {"compute_dtype": "float16"}
    told = run("mergekit-dam", "check", recipe(models[:2], dam=halves)).stderr
    assert "Warning: `dam.compute_dtype: float16` loses small gradients" in told
    paper = {"preset": "paper", "steps": None, "objective": {"kl": 1}}
    assert "no effect" not in run("mergekit-dam", "check", recipe(models[:2], dam=paper)).stderr


def test_more_rows_in_a_step_than_there_are(recipe, models) -> None:
    told = run("mergekit-dam", "check", recipe(models[:2], dam={"batch_size": 500})).stderr
    assert re.search(r"`dam.batch_size` is 500, but of no .* than (\d+), .*: \1 is enough", told)
    path = recipe(models[:2], dam={"batch_size": 10**9})
    assert "`dam.batch_size` Input should be less than" in refusal("mergekit-dam", "check", path)


def test_an_error_stands_on_a_line_of_its_own(recipe, models, tmp_path) -> None:
    path = recipe(models[:2], dam={"learning_rate": 1e30, "max_grad_norm": 0, "steps": 8})
    told = run("mergekit-dam", "fit", path, succeeds=False).stderr
    assert "Fitting" in told
    assert told.rstrip().splitlines()[-1].startswith("Error: ")
