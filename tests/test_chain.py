"""Chains of merges in one file: `dam` feeds mergekit's methods, and they feed `dam`."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import transformers
import yaml
from commands import refusal, run
from compatibility import shows
from safetensors.torch import load_file, save_file

from mergekit_dam.coefficients import CoefficientFile, save


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


@shows(
    "commands",
    "`mergekit-dam run` on a chain of merges",
    "fits each `dam` step when its inputs exist; `mergekit-multi` then makes the same of the file",
)
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


@shows("commands", "the same again", "intermediate merges are kept")
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


def test_steps_without_a_coefficient_file(chain, tmp_path):
    del chain[0]["parameters"]
    last = {key: value for key, value in chain[0].items() if key != "name"}
    message = refusal("mergekit-dam", "run", write(tmp_path, [chain[0], last]), tmp_path / "out")
    assert "parameters.coefficients" in message
    assert "is the file of" not in message


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


def test_a_step_whose_source_writes_its_own_rows(chain, tmp_path):
    chain[0]["dam"]["data"][0] = {"source": "soup", "generate": 12, "loss_on": "all"}
    chain[0]["dam"]["max_length"] = 16
    path, out = write(tmp_path, chain), tmp_path / "out"
    for _ in range(2):  # the second time the steps are there
        run("mergekit-dam", "run", path, out, "--overwrite")
    tiny.load(out)


@pytest.mark.parametrize("what", ["a pattern", "a start"])
def test_all_that_a_step_reads_is_part_of_it(chain, tmp_path, what):
    rows = tmp_path / "rows"
    rows.mkdir()
    tiny.write_jsonl(rows / "a.jsonl", [{"text": text} for text in tiny.sentences(16, 5)])
    entry = chain[0]["dam"]["data"][1]
    if what == "a pattern":
        entry["path"] = f"{rows}/*.jsonl"
    path, out = write(tmp_path, chain), tmp_path / "out"
    run("mergekit-dam", "run", path, out)
    if what == "a start":
        chain[0]["dam"]["start"] = str(tmp_path / "start.safetensors")
        shutil.copy(tmp_path / "first.safetensors", tmp_path / "start.safetensors")
        path = write(tmp_path, chain)
        shutil.rmtree(f"{out}.steps/first")
        run("mergekit-dam", "run", path, out, "--overwrite")
        file = CoefficientFile(tmp_path / "start.safetensors")
        save(file.path, {name: 2 * file.get(name) for name in file.names}, file.header)
        told = "start.safetensors"
    else:
        tiny.write_jsonl(rows / "a.jsonl", [{"text": text} for text in tiny.sentences(16, 6)])
        told = entry["path"]
    message = refusal("mergekit-dam", "run", path, out, "--overwrite")
    assert f"was made of another {tmp_path / told}" in message


def test_check_finds_a_step_whose_model_is_incomplete(chain, models, tmp_path):
    broken = tmp_path / "broken"
    tiny.load(models[1]).save_pretrained(broken, max_shard_size="10KB")
    tiny.save_tokenizer(broken)
    shards = sorted(broken.glob("model-*.safetensors"))
    shards[1].unlink()
    chain[1]["models"][1]["model"] = str(broken)
    message = refusal("mergekit-dam", "check", write(tmp_path, chain))
    assert f"{broken} lacks the file {shards[1]}" in message


def test_missing_data_and_models_are_told_before_the_first_merge(chain, tmp_path):
    out, steps = tmp_path / "out", tmp_path / "out.steps"
    chain[0]["dam"]["data"][0]["path"] = "gone.jsonl"
    chain[2]["models"][1]["model"] = "./nowhere"
    message = refusal("mergekit-dam", "run", write(tmp_path, chain), out)
    assert "gone.jsonl" in message
    assert "nowhere" in message
    assert not steps.exists()


def test_a_step_of_another_config_is_not_taken(chain, tmp_path):
    path = write(tmp_path, chain)
    run("mergekit-dam", "run", path, tmp_path / "a", "-I", tmp_path / "steps", "--quiet")
    chain[1]["models"][0]["parameters"]["weight"] = 3.0
    path = write(tmp_path, chain)
    message = refusal("mergekit-dam", "run", path, tmp_path / "b", "-I", tmp_path / "steps")
    assert str(tmp_path / "steps" / "soup") in message
    assert "--intermediate-dir" in message


@shows(
    "commands", "the same with inputs that have changed", "refused, with the input and the remedy"
)
@pytest.mark.parametrize("changed", ["source", "source's config", "base", "intermediate", "data"])
def test_a_step_whose_inputs_have_changed_is_not_taken(chain, models, tmp_path, changed):
    own = [Path(shutil.copytree(model, tmp_path / f"own{n}")) for n, model in enumerate(models)]
    text = write(tmp_path, chain).read_text()
    for model, copied in zip(models, own, strict=True):
        text = text.replace(f"{model}\n", f"{copied}\n")
    (path := tmp_path / "chain.yml").write_text(text)
    steps = tmp_path / "steps"
    run("mergekit-dam", "run", path, tmp_path / "a", "-I", steps, "--quiet")
    run("mergekit-dam", "check", path, "-I", steps)
    step, what = "first", own[2]
    if changed == "data":
        what = tmp_path / "0.jsonl"
        what.write_text(what.read_text().replace("a", "b"))
    elif changed == "source's config":
        config = json.loads((what / "config.json").read_text())
        (what / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    else:
        step, what = {
            "source": ("first", own[2]),
            "base": ("first", own[0]),
            "intermediate": ("first", steps / "soup"),
        }[changed]
        file = what / "model.safetensors"
        tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    for command in (("check", path), ("run", path, tmp_path / "b")):
        message = refusal("mergekit-dam", *command, "-I", steps)
        assert f"{steps}/{step} was made of another {what}, which has changed since" in message
        assert "--intermediate-dir" in message
    assert not (tmp_path / "b").exists()


def test_a_step_merged_with_other_coefficients_is_not_taken(chain, tmp_path):
    path, steps = write(tmp_path, chain), tmp_path / "steps"
    run("mergekit-dam", "run", path, tmp_path / "a", "-I", steps, "--quiet")
    file = CoefficientFile(tmp_path / "first.safetensors")
    save(file.path, {name: file.get(name) * 2 for name in file.names}, file.header)
    message = refusal("mergekit-dam", "run", path, tmp_path / "b", "-I", steps)
    assert f"{steps}/first was merged with other coefficients" in message


@shows(
    "commands",
    "`mergekit-dam check` on a chain of merges",
    "every step, as far as its inputs are there",
)
def test_check_takes_a_chain(chain, tmp_path):
    path, steps = write(tmp_path, chain), tmp_path / "steps"
    before = sorted(tmp_path.iterdir())
    said = run("mergekit-dam", "check", path).stdout
    assert "soup, ready" in said
    assert "first, after soup" in said
    assert "last merge, after first" in said
    assert "2 sources" not in said  # nothing to plan on
    assert sorted(tmp_path.iterdir()) == before
    run("mergekit-dam", "run", path, tmp_path / "a", "-I", steps, "--quiet")
    shutil.rmtree(steps / "first")
    said = run("mergekit-dam", "check", path, "-I", steps).stdout
    assert "first, ready\n2 sources and the base, 21 output tensors" in said


def test_check_tells_the_mistakes_of_every_step(chain, models, tmp_path):
    wide = tiny.save_model(
        tmp_path / "wide", transformers.LlamaConfig(**{**tiny.SIZES, "hidden_size": 32}), 9
    )
    chain[0]["dam"]["data"][0]["path"] = "gone.jsonl"
    chain[1]["tokenizer"] = {"source": "unoin"}
    second = {
        **chain[0],
        "name": "second",
        "models": [{"model": str(m)} for m in (models[0], wide)],
    }
    second["parameters"] = {"coefficients": str(tmp_path / "second.safetensors")}
    second["dam"] = {
        "data": [
            {"source": str(m), "path": chain[0]["dam"]["data"][1]["path"]}
            for m in (models[0], wide)
        ]
    }
    path = write(tmp_path, [*chain, second])
    for command in (("check", path), ("run", path, tmp_path / "out")):
        message = refusal("mergekit-dam", *command)
        assert "has 3 mistakes" in message
        assert "first: `dam.data.0.path`: the data file gone.jsonl does not exist" in message
        assert "soup: `tokenizer.source` is unoin" in message
        assert "second: the sources' shapes of" in message
    assert not (tmp_path / "out.steps").exists()


def test_fit_takes_one_merge(chain, tmp_path):
    assert "mergekit-dam run" in refusal("mergekit-dam", "fit", write(tmp_path, chain))
