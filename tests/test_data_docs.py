"""Every piece of YAML and every row in docs/data.md, tried with real files and models."""

import json
import re
from pathlib import Path

import datasets
import pytest
import tiny
import yaml
from click.testing import CliRunner

from mergekit_dam.cli import main

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
ROWS = [
    json.loads(line)
    for block in re.findall(r"^```json\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
ASKED = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(40)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the page's models and data; what the page takes from the Hub lies
    here in folders of the same name, with the same splits."""
    for seed, name in enumerate(("math", "code")):
        tiny.save_model(tmp_path / name, tiny.CONFIGS["llama"], seed)
        tiny.save_tokenizer(tmp_path / name, TEMPLATE)
    tiny.write_jsonl(tmp_path / "math.jsonl", ASKED)
    renamed = [{"query": row["prompt"], "reply": row["completion"]} for row in ASKED]
    tiny.write_jsonl(tmp_path / "asked.jsonl", renamed)
    texts = [{"content": text, "text": text} for text in tiny.sentences(40, seed=1)]
    tiny.write_jsonl(tmp_path / "code.jsonl", texts)
    datasets.Dataset.from_list(texts).to_parquet(tmp_path / "code" / "rows.parquet")
    datasets.Dataset.from_list(ASKED).to_csv(tmp_path / "chat.csv")
    for path, rows in (("openai/gsm8k/main", ASKED), ("me/corpus", texts)):
        (tmp_path / path).mkdir(parents=True)
        tiny.write_jsonl(tmp_path / path / "train.jsonl", rows)
    (tmp_path / "openai/gsm8k/README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files: main/train.jsonl\n---\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_block_is_ready_to_fit(here: Path, number: int) -> None:
    document = {
        "merge_method": "dam",
        "models": [{"model": "./math"}, {"model": "./code"}],
        "parameters": {"coefficients": "./dam.safetensors"},
        **yaml.safe_load(BLOCKS[number]),
    }
    Path("config.yml").write_text(yaml.safe_dump(document), encoding="utf-8")
    result = CliRunner().invoke(main, ["check", "config.yml"])
    assert result.exit_code == 0, result.output
    assert "./math: " in result.output and "./code: " in result.output
    assert ("predictions count" in result.output) == ("loss_on" in BLOCKS[number])
    assert ("itself, from its chat" in result.output) == ("generate" in BLOCKS[number])


def test_the_pages_rows_are_rows(here: Path) -> None:
    """All in one file, as a mixed one."""
    tiny.write_jsonl(here / "math.jsonl", ROWS)
    assert len(ROWS) >= 4
    document = {
        "merge_method": "dam",
        "models": [{"model": "./math"}],
        "parameters": {"coefficients": "./dam.safetensors"},
        "dam": {"data": {"path": "math.jsonl"}},
    }
    Path("config.yml").write_text(yaml.safe_dump(document), encoding="utf-8")
    result = CliRunner().invoke(main, ["check", "config.yml"])
    assert result.exit_code == 0, result.output
    assert f"{len(ROWS) - 1} rows to train on and 1 held out" in result.output
