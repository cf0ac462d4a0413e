"""What `check` shows of the data."""

import re
from pathlib import Path

import pytest
import tiny
import yaml
from commands import run
from transformers import AutoTokenizer

from mergekit_dam.check.preview import preview
from mergekit_dam.data import Row, SourceData


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    return tiny.save_models(tmp_path_factory.mktemp("models"), tiny.CONFIGS["llama"], 2)


@pytest.fixture
def tokenizer(tmp_path):
    tiny.save_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_check_shows_a_row_of_every_source(recipe, models, tmp_path):
    rows = [{"prompt": "ab=", "completion": f"c{letter}"} for letter in tiny.LETTERS[:19]]
    rows.append({"prompt": "ab=", "completion": "c" * 9})
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    data = [{"source": str(m), "path": str(path)} for m in models]
    data[1]["loss_on"] = "completion"
    config = recipe(models, dam={"data": data, "max_length": 8, "held_out": 0.1})
    shown = run("mergekit-dam", "check", config).stdout.rstrip().split("\n\n")[1:]
    assert [text.partition(":")[0] for text in shown] == [str(model) for model in models]
    counts, row = shown[0].rstrip().split("\n")
    assert counts.endswith(
        ": 18 rows to train on and 2 held out; 141 tokens (7 a row, at most 8); 5% of the rows are "
        "cut to their length"
    )
    assert re.fullmatch(r"  \| <bos>ab=c\w<eos>", row)
    assert "; 61 predictions count; " in shown[1]
    assert re.search(r"\| <bos>ab=▸c\w<eos>$", shown[1].rstrip())


def test_a_long_row_is_cut_to_a_screen(tokenizer):
    row = Row([1, *[5] * 4000, 2], start=3000)
    shown = preview("./m0", SourceData([row], [row]), tokenizer)
    assert "<bos>" in shown and "<eos>" in shown and "▸" in shown and "…" in shown
    lines = shown.splitlines()
    assert len(lines) <= 15
    assert max(map(len, lines[1:])) <= 110


def test_what_would_steer_a_terminal_is_written_out():
    class Decoder:
        def decode(self, ids):
            return "a\x1b[2J\u202eb\nc"

    shown = preview("./m0", SourceData([Row([1, 2])], [Row([1, 2])]), Decoder())
    assert shown.endswith("  | a\\x1b[2J\\u202eb\n  | c")


@pytest.mark.parametrize("command", ["check", "fit"])
def test_a_benchmarks_test_set_is_warned_of(recipe, models, tmp_path, monkeypatch, command):
    config = recipe(models)
    document = yaml.safe_load(config.read_text())
    path = tiny.write_jsonl(tmp_path / "gsm8k_test.jsonl", [{"text": t} for t in ("ab", "cd")])
    document["dam"]["data"][1]["path"] = str(path)
    config.write_text(yaml.safe_dump(document))
    result = run("mergekit-dam", command, config)
    assert "look like the test set of gsm8k" in result.stderr
    assert result.stderr.count("test set of") == 1
