"""Chains of merges in one file: `dam` feeds mergekit's methods, and they feed `dam`."""

from pathlib import Path

import pytest
import tiny
import yaml
from commands import refusal, run
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    return tiny.save_models(tmp_path_factory.mktemp("models"), tiny.CONFIGS["llama"], 4)


@pytest.fixture
def chain(models, tmp_path) -> list[dict]:
    """soup = linear of two, first = dam of soup and a third, last = ties of first and others."""
    m = [str(model) for model in models]
    rows = [
        str(tiny.write_jsonl(tmp_path / f"{n}.jsonl", [{"text": t} for t in tiny.sentences(16, n)]))
        for n in range(2)
    ]
    dam = {"steps": 2, "batch_size": 2, "held_out": 0.2}
    return [
        {
            "name": "first",
            "merge_method": "dam",
            "base_model": m[0],
            "models": [{"model": "soup"}, {"model": m[2]}],
            "parameters": {"coefficients": str(tmp_path / "first.safetensors")},
            "dtype": "float32",
            "dam": {
                **dam,
                "data": [{"source": "soup", "path": rows[0]}, {"source": m[2], "path": rows[1]}],
            },
        },
        {
            "name": "soup",
            "merge_method": "linear",
            "models": [{"model": name, "parameters": {"weight": 1.0}} for name in m[:2]],
            "dtype": "float32",
        },
        {
            "merge_method": "ties",
            "base_model": m[0],
            "models": [
                {"model": name, "parameters": {"weight": 0.5, "density": 0.7}}
                for name in ("first", m[3])
            ],
            "dtype": "float32",
        },
    ]


def write(tmp_path: Path, chain: list[dict]) -> Path:
    path = tmp_path / "chain.yml"
    path.write_text(yaml.safe_dump_all(chain, sort_keys=False))
    return path


def test_run_fits_each_step_when_its_inputs_exist(chain, tmp_path):
    path, out = write(tmp_path, chain), tmp_path / "out"
    run("mergekit-dam", "run", path, out)
    steps = Path(f"{out}.steps")
    assert {folder.name for folder in steps.iterdir()} == {"first", "soup"}
    assert "| mean |" in (steps / "first" / "README.md").read_text()
    for folder in (out, steps / "first", steps / "soup"):
        tiny.load(folder)
    # mergekit-multi makes the same of it, once the coefficients are there.
    run("mergekit-multi", path, "--out-path", tmp_path / "m", "-I", steps, "--quiet")
    ours, stock = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "m"))
    assert all(ours[name].equal(tensor) for name, tensor in stock.items())


def test_intermediate_merges_are_not_made_again(chain, tmp_path):
    path = write(tmp_path, chain)
    run("mergekit-dam", "run", path, tmp_path / "a", "-I", tmp_path / "steps", "--quiet")
    soup = tmp_path / "steps" / "soup" / "model.safetensors"
    fitted = tmp_path / "first.safetensors"
    before = soup.stat().st_mtime_ns, fitted.stat().st_mtime_ns
    run("mergekit-dam", "run", path, tmp_path / "b", "-I", tmp_path / "steps", "--quiet")
    assert (soup.stat().st_mtime_ns, fitted.stat().st_mtime_ns) == before
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()


def test_dam_as_the_last_step(chain, tmp_path):
    last = {key: value for key, value in chain[0].items() if key != "name"}
    run("mergekit-dam", "run", write(tmp_path, [chain[1], last]), tmp_path / "out", "--quiet")
    tiny.load(tmp_path / "out")


def test_mistakes_are_told_before_the_first_merge(chain, tmp_path):
    out, steps = tmp_path / "out", tmp_path / "out.steps"

    def message(documents: list[dict]) -> str:
        told = refusal("mergekit-dam", "run", write(tmp_path, documents), out)
        assert not steps.exists()
        return told

    assert "`tie`" not in message([*chain[:2], {**chain[2], "merge_method": "tie"}])
    assert "densty" in message([*chain[:2], {**chain[2], "parameters": {"densty": 1}}])
    assert "learning_rat" in message([{**chain[0], "dam": {"learning_rat": 1}}, *chain[1:]])
    assert "name" in message([{**chain[0], "name": "soup"}, *chain[1:]])
    twin = {**chain[0], "name": "twin"}
    assert "is the file of first, too" in message([*chain, twin])
    circle = {**chain[1], "models": [{"model": "first", "parameters": {"weight": 1}}]}
    assert "circle" in message([chain[0], circle, chain[2]])
    assert "has none" in message(chain[:2])


def test_missing_data_and_models_are_told_before_the_first_merge(chain, tmp_path):
    out, steps = tmp_path / "out", tmp_path / "out.steps"
    chain[0]["dam"]["data"][0]["path"] = "gone.jsonl"
    chain[2]["models"][1]["model"] = "./nowhere"
    message = refusal("mergekit-dam", "run", write(tmp_path, chain), out)
    assert "gone.jsonl" in message
    assert "./nowhere" in message or "nowhere" in message
    assert not steps.exists()


def test_a_step_of_another_config_is_not_taken(chain, tmp_path):
    path = write(tmp_path, chain)
    run("mergekit-dam", "run", path, tmp_path / "a", "-I", tmp_path / "steps", "--quiet")
    chain[1]["models"][0]["parameters"]["weight"] = 3.0
    path = write(tmp_path, chain)
    message = refusal("mergekit-dam", "run", path, tmp_path / "b", "-I", tmp_path / "steps")
    assert str(tmp_path / "steps" / "soup") in message
    assert "--intermediate-dir" in message


@pytest.mark.parametrize("command", ["fit", "check"])
def test_other_commands_take_one_merge(chain, tmp_path, command):
    assert "mergekit-dam run" in refusal("mergekit-dam", command, write(tmp_path, chain))
