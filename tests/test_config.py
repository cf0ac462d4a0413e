"""Mistakes in the YAML: found before anything is loaded, all at once, one sentence each."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
import transformers
import yaml
from click.testing import CliRunner, Result
from mergekit.common import ModelReference

from mergekit_dam.cli import main
from mergekit_dam.config import DataSettings, Settings, read_recipe
from mergekit_dam.config.recipe import match_reference
from mergekit_dam.config.settings import PRESETS
from mergekit_dam.errors import DamError
from mergekit_dam.fit import place

DATA = ({"source": "./m0", "path": "m0.jsonl"},)
Check = Callable[..., Result]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tiny.save_models(tmp_path_factory.mktemp("models"), tiny.CONFIGS["llama"], 2)


@pytest.fixture(scope="module")
def large_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that does not fit the first two."""
    config = transformers.LlamaConfig(**tiny.SIZES | {"vocab_size": 50})
    return tiny.save_model(tmp_path_factory.mktemp("others") / "large", config, seed=5)


@pytest.fixture
def document(models: list[Path], tmp_path: Path) -> dict[str, Any]:
    """A config without mistakes."""
    for model in models:
        rows = [{"text": text} for text in tiny.sentences(4, seed=1)]
        tiny.write_jsonl(tmp_path / f"{model.name}.jsonl", rows)
    return {
        "merge_method": "dam",
        "models": [{"model": str(model)} for model in models],
        "parameters": {"coefficients": str(tmp_path / "dam.safetensors")},
        "dtype": "float32",
        "dam": {
            "data": [
                {"source": str(model), "path": str(tmp_path / f"{model.name}.jsonl")}
                for model in models
            ]
        },
    }


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Runs `mergekit-dam check` on a document, or on a text that is none."""

    def run(document: dict | str, *flags: str) -> Result:
        path = tmp_path / "config.yml"
        text = document if isinstance(document, str) else yaml.safe_dump(document)
        path.write_text(text, encoding="utf-8")
        return CliRunner().invoke(main, ["check", str(path), *flags])

    return run


def put(document: dict, key: str, value: Any) -> dict:
    """Sets the value at a dotted key."""
    *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    place: Any = document
    for parent in parents:
        place = place[parent] if isinstance(place, list) else place.setdefault(parent, {})
    place[last] = value
    return document


def sentences(result: Result) -> list[str]:
    """The mistakes of a refused config: one line each, without a traceback."""
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    message = result.output.rpartition("Error: ")[2].strip()
    first, *others = message.splitlines()
    if not others:
        return [first.partition(".yml: ")[2] or first]
    assert first.endswith(f"has {len(others)} mistakes:")
    return [line.removeprefix("  - ") for line in others]


def only(result: Result) -> str:
    (sentence,) = sentences(result)
    return sentence


# ---- keys


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("dtyp", "dtype"),
        ("modls", "models"),
        ("bse_model", "base_model"),
        ("parameters.coeficients", "coefficients"),
        ("models.0.paramaters", "parameters"),
        ("models.1.parameters.coefficient", "coefficients"),
        ("tokenizer.sorce", "source"),
        ("dam.step", "steps"),
        ("dam.lerning_rate", "learning_rate"),
        ("dam.objective.similarty", "similarity"),
        ("dam.train.embeddings", "embedding"),
        ("dam.data.1.exampels", "examples"),
    ],
)
def test_unknown_keys_are_named_with_the_nearest_right_one(
    document: dict, check: Check, key: str, nearest: str
) -> None:
    message = only(check(put(document, key, {} if key.endswith("rs") else 1)))
    assert message.startswith(f"`{key}` is not a key, did you mean `{nearest}`?")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("slices.0.source", "sources"),
        ("slices.0.sources.0.layer_rang", "layer_range"),
        ("slices.0.sources.0.parameters.coefs", "coefficients"),
        ("modules.text.slice", "slices"),
        ("modules.text.models.0.modle", "model"),
    ],
)
def test_unknown_keys_are_found_in_slices_and_modules(
    document: dict, tmp_path: Path, key: str, nearest: str
) -> None:
    model = document["models"][0]["model"]
    if key.startswith("slices"):
        document.pop("models")
        document["slices"] = [{"sources": [{"model": model, "layer_range": [0, 2]}]}]
    else:
        document["modules"] = {"text": {"models": document.pop("models")}}
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(put(document, key, 1)))
    problems = read_recipe(str(path)).problems
    assert problems == (f"`{key}` is not a key, did you mean `{nearest}`?",)


def test_a_key_unlike_all_others_is_named_alone(document: dict, check: Check) -> None:
    assert only(check(put(document, "zzz", 1))) == "`zzz` is not a key."


def test_mistakes_end_with_one_mark(document: dict, check: Check) -> None:
    assert only(check(put(document, "dtyp", 1))).endswith("`dtype`?")


def test_right_keys_of_mergekits_are_taken(document: dict, check: Check) -> None:
    document |= {"name": "merge", "tokenizer": {"source": "union"}, "chat_template": "auto"}
    result = check(document)
    assert result.exit_code == 0, result.output
    assert "is ready to fit" in result.output


# ---- values


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", -1),
        ("steps", 1.5),
        ("steps", "many"),
        ("epochs", 0),
        ("batch_size", 0),
        ("accumulation", 0),
        ("learning_rate", 0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("warmup", 1),
        ("max_grad_norm", -1),
        ("seed", -1),
        ("examples", 1),
        ("max_length", 1),
        ("held_out", 0),
        ("held_out", 1.5),
        ("checkpoint_every", 0),
        ("granularity", "colum"),
        ("formula", "deltas"),
        ("schedule", "wavy"),
        ("compute_dtype", "float8"),
        ("preset", "papr"),
        ("preset", ["paper"]),
        ("objective.kl", -1),
        ("objective.similarity", float("inf")),
        ("objective.temperature", 0),
        ("train.bias", "perhaps"),
        ("data.0.examples", 1),
        ("data.0.max_length", 1),
        ("data.0.held_out", 1.5),
        ("data.0.path", 3),
        ("report_to", 3),
    ],
)
def test_values_out_of_range_are_named(
    document: dict, check: Check, key: str, value: object
) -> None:
    message = only(check(put(document, f"dam.{key}", value)))
    assert message.startswith(f"`dam.{key}` ")
    assert f"(it is {value!r})" in message


def test_data_that_is_no_list_is_named(document: dict, check: Check) -> None:
    message = only(check(put(document, "dam.data", "m0.jsonl")))
    assert message.startswith("`dam.data` ")
    assert "tuple" not in message  # a word of Python's, not of YAML's


def test_one_entry_for_all_sources(document: dict, check: Check) -> None:
    """Without a list and a source, or in a list for all the sources that have none."""
    path = document["dam"]["data"][0]["path"]
    listed = [document["dam"]["data"][0], {"source": "*", "path": path}]
    for data in ({"path": path}, listed):
        result = check(put(document, "dam.data", data))
        assert result.exit_code == 0, result.output


def test_mistakes_in_an_entry_for_all_sources_are_placed(document: dict, check: Check) -> None:
    data = {"path": document["dam"]["data"][0]["path"], "exampels": 3}
    message = only(check(put(document, "dam.data", data)))
    assert message == "`dam.data.exampels` is not a key, did you mean `examples`?"


def test_a_missing_key_is_named(document: dict, check: Check) -> None:
    del document["dam"]["data"][1]["source"]
    assert only(check(document)) == "`dam.data.1.source` is missing."


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({}, "give a `path`, or the number of rows to `generate`"),
        ({"path": "a.jsonl", "generate": 5}, "give a `path`, or the number of rows to `generate`"),
        ({"generate": 5, "split": "test"}, "`split` has no effect on rows that a source writes"),
        ({"generate": 5, "text": "content"}, "`text` has no effect on rows that a source writes"),
        ({"generate": 5, "held_out": "test"}, "have no splits to hold out"),
        ({"generate": 1}, "greater than or equal to 2"),
        ({"path": "a.jsonl", "text": "a", "columns": {"text": "b"}}, "`text` or `columns`, not"),
    ],
)
def test_an_entry_says_where_its_rows_come_from(
    document: dict, check: Check, entry: dict, part: str
) -> None:
    document["dam"]["data"][1] = {"source": document["dam"]["data"][1]["source"], **entry}
    message = only(check(document))
    assert message.startswith("`dam.data.1")
    assert part in message


@pytest.mark.parametrize("block", ["text", [1]])
def test_a_block_that_is_no_block(document: dict, check: Check, block: object) -> None:
    assert only(check(document | {"dam": block})).startswith("`dam` ")


def test_steps_and_epochs_exclude_each_other(document: dict, check: Check) -> None:
    document["dam"] |= {"steps": 10, "epochs": 1}
    assert only(check(document)) == "`dam` give `steps` or `epochs`, not both."


def test_yaml_1_1_reads_1e_3_as_text_and_we_do_not() -> None:
    assert yaml.safe_load("1e-3") == "1e-3"
    assert Settings(data=DATA, learning_rate="1e-3").learning_rate == 1e-3


def test_lengths_of_a_fit() -> None:
    assert Settings(data=DATA).max_steps == 1200
    assert Settings(data=DATA, steps=0).max_steps == 0
    assert Settings(data=DATA, steps=7).max_steps == 7
    assert Settings(data=DATA, epochs=2).max_steps == -1


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings(data=DATA).steps = 3


@pytest.mark.parametrize("model", [Settings, DataSettings])
def test_every_setting_is_described(model: type) -> None:
    assert all(len(field.description or "") > 10 for field in model.model_fields.values())


# ---- the paper's settings


def test_preset_paper_gives_the_published_settings() -> None:
    paper = Settings(data=DATA, preset="paper")
    assert (paper.epochs, paper.steps, paper.max_steps) == (1, None, -1)
    assert (paper.examples, paper.max_length) == (1729, 2048)
    assert (paper.learning_rate, paper.schedule) == (1e-3, "constant")
    assert (paper.objective.temperature, paper.objective.similarity) == (2.0, 0.01)
    assert (paper.formula, paper.granularity) == ("weights", "column")


def test_what_is_given_goes_before_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS["paper"]["objective"], "l1", 0.25)
    paper = Settings(data=DATA, preset="paper", examples=5, objective={"similarity": 0.5})
    assert (paper.examples, paper.max_length) == (5, 2048)
    assert paper.objective.similarity == 0.5
    assert paper.objective.l1 == 0.25  # the preset's other terms stay


def test_steps_go_before_the_presets_epoch() -> None:
    assert Settings(data=DATA, preset="paper", steps=3).max_steps == 3


def test_preset_paper_survives_being_written_and_read() -> None:
    paper = Settings(data=DATA, preset="paper", steps=3)
    assert Settings.model_validate(json.loads(paper.model_dump_json())) == paper


# ---- the file itself


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [", "is not YAML"),
        ("", "holds no merge config"),
        ("- a", "holds no merge config"),
        ("models: []", "merge_method is None: set it to `dam`"),
        ("merge_method: linear", "merge_method is 'linear': set it to `dam`"),
        ("merge_method: dam", "must be present"),
    ],
)
def test_a_file_that_is_no_config(check: Check, text: str, part: str) -> None:
    result = check(text)
    assert result.exit_code == 1
    assert "config.yml" in result.output
    assert part in only(result)


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DamError, match=r"nowhere\.yml cannot be read"):
        read_recipe(str(tmp_path / "nowhere.yml"))


def test_a_source_is_named_as_mergekit_names_models() -> None:
    models = [ModelReference.parse(name) for name in ("./m0", "org/m1@main", "./m2+./lora")]
    assert match_reference("org/m1@main", models) == models[1]
    assert match_reference("./m2+./lora", models) == models[2]
    assert match_reference("./m2", models) is None


# ---- check: what does not fit together


def test_a_config_without_mistakes_gets_an_estimate(document: dict, check: Check) -> None:
    result = check(document)
    assert result.exit_code == 0, result.output
    assert "is ready to fit" in result.output
    assert "2 sources, 21 output tensors, 21 of them with trained coefficients" in result.output


def test_the_estimate_counts_what_is_trained(document: dict, check: Check) -> None:
    result = check(put(document, "dam.train", {"norm": False}))
    assert "21 output tensors, 16 of them with trained coefficients" in result.output


def test_check_tells_what_a_fit_would_lack_here(
    document: dict, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no mistake: the fit may run elsewhere."""
    assert "needs about" not in check(document).output
    monkeypatch.setattr(place, "free_memory", lambda device: 100_000)
    result = check(put(document, "dam.recompute", "none"))
    assert result.exit_code == 0, result.output
    assert "of memory beside the sources" in result.output and ": set `dam." in result.output


def test_check_writes_nothing(document: dict, check: Check, tmp_path: Path) -> None:
    check(document)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yml", "m0.jsonl", "m1.jsonl"]


def test_all_mistakes_are_told_at_once(document: dict, check: Check) -> None:
    put(document, "dtyp", 1)
    put(document, "models.0.paramaters", {})
    document["parameters"] = {}
    document["dam"]["data"][0]["path"] = "./gone.jsonl"
    document["dam"]["data"].pop()
    mistakes = sentences(check(document))
    assert len(mistakes) == 5
    for part in ("`dtyp`", "`models.0.paramaters`", "`parameters.coefficients`", "gone.jsonl"):
        assert sum(part in mistake for mistake in mistakes) == 1
    assert sum("no entry for the source" in mistake for mistake in mistakes) == 1


def test_settings_and_keys_are_told_together(document: dict, check: Check) -> None:
    put(document, "dtyp", 1)
    document["dam"] |= {"steps": -1, "step": 3}
    assert len(sentences(check(document))) == 3


def test_a_missing_model(document: dict, check: Check, tmp_path: Path) -> None:
    missing = str(tmp_path / "gone")
    document["models"][1]["model"] = document["dam"]["data"][1]["source"] = missing
    assert only(check(document)).startswith(f"The model {missing} cannot be opened")


def test_a_folder_without_weights(document: dict, check: Check, tmp_path: Path) -> None:
    folder = shutil.copytree(document["models"][1]["model"], tmp_path / "half")
    (folder / "model.safetensors").unlink()
    document["models"][1]["model"] = document["dam"]["data"][1]["source"] = str(folder)
    assert only(check(document)).startswith(f"The model {folder} cannot be opened")


def test_a_model_without_a_tokenizer(document: dict, check: Check, tmp_path: Path) -> None:
    folder = shutil.copytree(document["models"][0]["model"], tmp_path / "mute")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    document["models"][0]["model"] = document["dam"]["data"][0]["source"] = str(folder)
    assert f"The model {folder} has no tokenizer" in only(check(document))


def test_a_missing_data_file(document: dict, check: Check) -> None:
    document["dam"]["data"][0]["path"] = "./gone.jsonl"
    message = only(check(document))
    assert message == "`dam.data.0.path`: the data file ./gone.jsonl does not exist."


def test_data_for_an_unknown_source(document: dict, check: Check) -> None:
    source = document["models"][1]["model"]
    document["dam"]["data"].append({**document["dam"]["data"][1], "source": f"{source}x"})
    message = only(check(document))
    assert message.startswith(f"`dam.data.2.source` is {source}x, which is none of the sources")
    assert "did you mean" in message
    assert message.count(source) == 2  # within the wrong name, and as the right one


def test_two_entries_for_one_source(document: dict, check: Check) -> None:
    document["dam"]["data"].append(document["dam"]["data"][0])
    assert "`dam.data.2` is a second entry for the source" in only(check(document))


def test_no_entry_for_a_source(document: dict, check: Check) -> None:
    document["dam"]["data"].pop()
    source = document["models"][1]["model"]
    assert only(check(document)) == f"`dam.data` has no entry for the source {source}: add one."


def test_a_base_that_is_no_source_needs_no_data(document: dict, check: Check) -> None:
    document["base_model"] = document["models"].pop()["model"]
    document["dam"]["data"].pop()
    result = check(document)
    assert result.exit_code == 0, result.output
    assert "1 sources and the base" in result.output


def test_task_vectors_need_a_base(document: dict, check: Check) -> None:
    assert "set base_model" in only(check(put(document, "dam.formula", "task_vectors")))


def use(document: dict, model: Path) -> dict:
    document["models"][1]["model"] = document["dam"]["data"][1]["source"] = str(model)
    return document


def test_different_vocabularies_with_a_tokenizer_setting(
    document: dict, check: Check, large_vocabulary: Path
) -> None:
    document["tokenizer"] = {"source": "union"}
    result = check(use(document, large_vocabulary))
    assert result.exit_code == 0, result.output


def test_a_dtype_that_is_none(document: dict, check: Check) -> None:
    assert "flot32" in only(check(put(document, "dtype", "flot32")))


def test_a_fit_that_would_train_nothing(document: dict, check: Check) -> None:
    nothing = {"linear": False, "embedding": False, "norm": False, "bias": False}
    assert "`dam.train`" in only(check(put(document, "dam.train", nothing)))


@pytest.mark.parametrize("parameters", [None, {}, {"coefficients": None}])
def test_no_coefficients(document: dict, check: Check, parameters: dict | None) -> None:
    message = only(check(document | {"parameters": parameters}))
    assert message.startswith("`parameters.coefficients` is missing")


def test_coefficients_that_are_no_path(document: dict, check: Check) -> None:
    message = only(check(put(document, "parameters.coefficients", 3)))
    assert message.startswith("`parameters.coefficients` ")
    assert "is missing" not in message


def test_no_block(document: dict, check: Check) -> None:
    document.pop("dam")
    assert only(check(document)).startswith("there is no `dam:` block")


# ---- how a refusal ends


@pytest.mark.parametrize("flags", [[], ["-v"]])
def test_a_refusal_has_a_traceback_with_v_alone(
    document: dict, check: Check, flags: list[str]
) -> None:
    result = check(put(document, "dam.steps", -1), *flags)
    assert result.exit_code == 1
    assert ("Traceback" in result.output) == bool(flags)
    assert result.output.rstrip().splitlines()[-1].startswith("Error: ")


def test_an_error_nobody_foresaw_is_one_sentence_too(
    document: dict, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by\nnothing")

    monkeypatch.setattr("mergekit_dam.pipeline.check", fail)
    result = check(document)
    assert result.exit_code == 1
    assert result.output == "Error: by nothing (ZeroDivisionError; -v shows where).\n"
    assert "Traceback" in check(document, "-v").output


def test_the_command_line_refuses_alike(document: dict, tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(put(document, "dam.steps", -1)))
    message = commands.refusal("mergekit-dam", "check", path)
    assert message.startswith(f"{path}: `dam.steps` ")
    assert len(message.splitlines()) == 1
