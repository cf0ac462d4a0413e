"""Damaged input by the thousand: a `dam:` block, a YAML file, rows and files of data. Each ends
in a DamError, in mistakes that are named, or in a right result; never in a crash or a hang."""

import contextlib
import copy
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mergekit_dam.check import fit_problems
from mergekit_dam.cli import main
from mergekit_dam.config import DataSettings, Settings, is_chain, read_chain, read_recipe
from mergekit_dam.config.recipe import Recipe, parse_document
from mergekit_dam.data import Row, load_rows
from mergekit_dam.data.shapes import example as shaped
from mergekit_dam.data.tokens import Reader
from mergekit_dam.data.written import load_written
from mergekit_dam.errors import DamError

THOUSANDS = settings(
    max_examples=700, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
HUNDREDS = settings(THOUSANDS, max_examples=60)

DOCUMENT = {
    "merge_method": "dam",
    "base_model": "./base",
    "models": [
        {"model": "./math", "parameters": {"weight": [0.2, 0.8]}},
        {"model": "org/code+org/adapter", "parameters": {"weight": 0.5, "density": 0.5}},
    ],
    "parameters": {"coefficients": "./dam.safetensors", "normalize": True},
    "dtype": "bfloat16",
    "dam": {
        "data": [
            {
                "source": "./math",
                "path": "math.jsonl",
                "columns": {"prompt": "q", "completion": "a"},
            },
            {"source": "*", "generate": 64, "max_length": 256, "held_out": 0.1},
        ],
        "preset": "paper",
        "formula": "task_vectors",
        "sparsify": "ties",
        "granularity": [{"filter": "embed", "value": "tensor"}, {"value": "column"}],
        "train": {"bias": False},
        "objective": {"temperature": 1.5, "jsd": 0.5},
        "steps": 100,
        "learning_rate": 0.01,
        "seed": 3,
        "report_to": ["tensorboard"],
        "loss_on": "completion",
    },
}

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.sampled_from(["./math", "*", "tensor", "1e5", "-1", "~", "", "all", 10**40, -(10**40)])
)
keys = (
    st.text(max_size=6) | st.integers() | st.none() | st.sampled_from(list(Settings.model_fields))
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def places(value: Any, place: tuple = ()) -> list[tuple]:
    """Of every part of a document but the whole."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, part in inner:
        found.append((*place, key))
        if isinstance(part, dict | list):
            found += places(part, (*place, key))
    return found


@st.composite
def damaged(draw: st.DrawFn, only: str | None = None, whole: dict = DOCUMENT) -> dict:
    """A document with one to three of its parts replaced, removed, renamed or doubled."""
    document = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        there = [p for p in places(document) if only is None or p[0] == only]
        assume(there)
        *path, key = draw(st.sampled_from(there))
        parent = document
        for part in path:
            parent = parent[part]
        kind = draw(st.sampled_from(["replace", "remove", "rename", "add"]))
        if kind == "replace" or (kind != "remove" and isinstance(parent, list)):
            parent[key] = draw(values)
        elif kind == "remove":
            del parent[key]
        elif kind == "rename":
            parent[draw(keys)] = parent.pop(key)
        else:
            parent[draw(keys)] = draw(values)
    return document


def require_sound(recipe: Recipe) -> None:
    """Mistakes are sentences; what has none is what its own dump gives again."""
    assert all(isinstance(problem, str) and problem for problem in recipe.problems)
    assert all(len(problem) < 2000 for problem in recipe.problems)
    with contextlib.suppress(DamError):  # where mergekit's part leaves no source
        for problem in fit_problems(recipe, "cpu"):
            assert isinstance(problem, str) and problem
    if recipe.settings is not None and not recipe.problems:
        given = recipe.settings
        assert Settings.model_validate(given.model_dump()) == given
        numbers = [given.learning_rate, given.warmup, *dict(given.objective).values()]
        assert all(math.isfinite(number) and number >= 0 for number in numbers)
        for entry in given.data:
            assert (entry.path is None) != (entry.generate is None)


@THOUSANDS
@given(damaged(only="dam"))
def test_a_damaged_block(document: dict) -> None:
    require_sound(parse_document("config.yml", document, ""))


@THOUSANDS
@given(damaged())
def test_a_damaged_document(document: dict) -> None:
    try:
        recipe = parse_document("config.yml", document, "")
    except DamError:
        return
    if recipe.merge.merge_method == "dam":
        require_sound(recipe)


@THOUSANDS
@given(values)
def test_a_block_that_is_something_else(block: Any) -> None:
    require_sound(parse_document("config.yml", {**DOCUMENT, "dam": block}, ""))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """The document with models and data that exist, in the working directory."""
    folder = tmp_path_factory.mktemp("here")
    for seed, name in enumerate(("base", "math", "code")):
        tiny.save_model(folder / name, tiny.CONFIGS["llama"], seed)
    rows = [{"q": text, "a": text} for text in tiny.sentences(8, seed=1)]
    tiny.write_jsonl(folder / "math.jsonl", rows)
    document = copy.deepcopy(DOCUMENT)
    document["models"][1]["model"] = "./code"
    document["dam"]["data"][1] = {"source": "*", "generate": 64, "loss_on": "all"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield document


@HUNDREDS
@given(data=st.data())
def test_check_tells_every_mistake_in_words(here: dict, data: st.DataObject) -> None:
    """With models and data that exist: all that follows the reading of the YAML, too."""
    document = data.draw(damaged(only="dam", whole=here))
    try:
        text = yaml.safe_dump(document, sort_keys=False)
    except yaml.YAMLError:
        return  # keys of several kinds
    Path("config.yml").write_text(text, encoding="utf-8")
    result = CliRunner().invoke(main, ["check", "config.yml"])
    assert result.exit_code in (0, 1)
    assert "-v shows where" not in result.output  # how an error ends that nobody foresaw
    assert ("is ready to fit" in result.output) == (result.exit_code == 0)


TEXT = yaml.safe_dump(DOCUMENT, sort_keys=False)
SIGNS = st.sampled_from([*list("{}[]:,-&*!|>'\"%@`#?\n\t 01.~e"), "\x00", "\u2028", "é", "---\n"])


@st.composite
def damaged_text(draw: st.DrawFn) -> str:
    text = TEXT
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(text)))
        length = draw(st.integers(0, 12))
        text = text[:place] + "".join(draw(st.lists(SIGNS, max_size=3))) + text[place + length :]
    return text


LAUGHS = "dam:\n  a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"  {name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@THOUSANDS
@given(damaged_text())
@example("[" * 20_000)
@example("a: " + "9" * 5000)
@example("date: 2024-99-99")
@example("merge_method: dam\n" + LAUGHS + "  report_to: *i\n")
@example("merge_method: dam\ndam: &a\n  data: *a\n")
@example("merge_method: dam\ndam: &a [*a]\n")
@example("? [a]\n: b")
@example("a: !!python/object/apply:os.system [echo]")
@example("<<: 3")
@example("=: 3")
def test_a_damaged_file(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yml"
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        try:
            if is_chain(str(path)):
                read_chain(str(path), "steps")
            else:
                require_sound(read_recipe(str(path)))
        except DamError as error:
            assert len(error.message) < 20_000


# ---- data

TEMPLATE = "{% for m in messages %}{{ m.role[:1] }}={{ m.content + eos_token }}{% endfor %}"
COLUMNS = ["messages", "prompt", "completion", "text", "instruction", "input", "output",
           "question", "answer", "conversations", "role", "content", "from", "value"]  # fmt: skip
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": st.text(max_size=9)}
)
cells = st.text(max_size=12) | st.lists(messages, max_size=3) | st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(COLUMNS), inner, max_size=3), max_leaves=5,
)  # fmt: skip
rows = st.dictionaries(st.sampled_from(COLUMNS), cells, max_size=4)
mappings = st.none() | st.sampled_from(
    [{"text": "input"}, {"messages": "prompt"}, {"prompt": "role", "completion": "text"}]
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list:
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny.save_tokenizer(folder / "plain")
    tiny.save_tokenizer(folder / "chat", TEMPLATE)
    return [AutoTokenizer.from_pretrained(folder / name) for name in ("plain", "chat")]


def require_row(row: Row, length: int) -> None:
    assert len(row) <= length
    assert all(type(token) is int and 0 <= token < tiny.VOCABULARY for token in row.ids)
    assert row.start >= 0
    assert 0 <= row.counted < max(len(row), 1)


@THOUSANDS
@given(row=rows, mapping=mappings, chat=st.booleans(), length=st.integers(2, 20),
       loss_on=st.sampled_from(["all", "completion"]))  # fmt: skip
def test_a_damaged_row(
    tokenizers: list, row: dict, mapping: dict | None, chat: bool, length: int, loss_on: str
) -> None:
    entry = DataSettings(source="./m", path="rows.jsonl", columns=mapping)
    found = shaped(row, mapping)
    if found is None:
        return
    try:
        made = Reader(entry, loss_on, tokenizers[0], tokenizers[chat], length).row(found)
    except DamError as error:
        assert len(error.message) < 2000
        return
    require_row(made, length)


def as_bytes(ending: str) -> bytes:
    rows = [{"text": text, "prompt": text} for text in tiny.sentences(6, seed=1)]
    if ending == "csv":
        return b"text,prompt\n" + b"".join(b"%s,a\n" % row["text"].encode() for row in rows)
    lines = [json.dumps(row) if ending == "jsonl" else row["text"] for row in rows]
    return "\n".join(lines).encode()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt"])
@HUNDREDS
@given(data=st.data())
def test_a_damaged_data_file(
    tokenizers: list, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject,
    ending: str, streaming: bool,
) -> None:  # fmt: skip
    content = as_bytes(ending)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content)))
        length = data.draw(st.integers(0, 30))
        content = content[:place] + data.draw(st.binary(max_size=4)) + content[place + length :]
    path = tmp_path_factory.mktemp("data") / f"rows.{ending}"
    path.write_bytes(content)
    entry = DataSettings(source="./m", path=str(path), streaming=streaming)
    try:
        loaded = load_rows(entry, Settings(data=(entry,)), tokenizers[0], tokenizers[0])
    except DamError as error:
        assert "\n" not in error.message
        return
    for row in (*loaded.train, *loaded.held_out):
        require_row(row, 1024)


@THOUSANDS
@given(st.binary(max_size=40) | values.map(lambda v: json.dumps(v, default=str).encode())
       | st.builds(lambda t, p: json.dumps({"tokens": t, "prompt": p}, default=str).encode(),
                   st.lists(scalars, max_size=4) | values, values))  # fmt: skip
def test_a_damaged_file_of_written_rows(tmp_path_factory, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(content)
        try:
            found = load_written(path, vocabulary=5)
        except DamError:
            return
    for row in found:
        assert all(type(token) is int and 0 <= token < 5 for token in row.tokens)
        assert 0 <= row.prompt <= len(row.tokens)
