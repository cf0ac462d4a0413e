"""The guides in docs/: every command runs, every config is ready, every sentence is the code's."""

import re
import shlex
from pathlib import Path

import pytest
import tiny
import transformers
import yaml
from commands import run
from hub_server import TOKEN, Hub
from huggingface_hub import constants, hf_api
from safetensors.torch import load_file
from test_docs import messages

from mergekit_dam import report
from mergekit_dam.config.settings import PRESETS, Objective, Settings, Train

DRAWS = True
ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
MODELS = ("Qwen2.5-0.5B", "Qwen2.5-0.5B-Instruct", "Qwen2.5-Coder-0.5B-Instruct")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """An empty folder, but for what the Hub would give: models and data under their names there."""
    sizes = {**tiny.SIZES, "max_position_embeddings": 256}
    for seed, name in enumerate(MODELS):
        path = tiny.save_model(tmp_path / "Qwen" / name, transformers.Qwen2Config(**sizes), seed)
        tiny.save_tokenizer(path, TEMPLATE)
    rows = [{"question": f"{n}+1=", "answer": str(n + 1)} for n in range(40)]
    data = tmp_path / "openai" / "gsm8k"
    (data / "main").mkdir(parents=True)
    tiny.write_jsonl(data / "main" / "train.jsonl", rows)
    (data / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files: main/train.jsonl\n---\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_tutorial(folder: Path, monkeypatch):
    """All commands in their order; a shorter fit than the page's."""
    merge, rebuild = blocks("tutorial.md", "yaml")
    document = yaml.safe_load(merge)
    document["dam"] |= {"steps": 8, "evaluate_every": 4, "max_length": 24, "batch_size": 2}
    document["dam"]["data"][1]["generate"] = 12
    Path("merge.yml").write_text(yaml.safe_dump(document))
    Path("rebuild.yml").write_text(rebuild)
    install, *commands = (block.strip() for block in blocks("tutorial.md", "sh"))
    assert install == "pip install -e '.[report]' -c constraints.txt"
    with Hub() as hub:
        for name, value in (
            ("ENDPOINT", hub.url),
            ("HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_XET", True),
            ("HF_HUB_CACHE", str(folder / "cache")),
        ):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for command in commands:
            run(*shlex.split(command))
        assert set(hub.repositories) == {"you/qwen-instruct-coder"}
    assert report.page_beside("dam.safetensors") == "dam.html" and Path("dam.html").exists()
    ours, theirs = (load_file(f"{name}/model.safetensors") for name in ("merged", "rebuilt"))
    assert all((tensor == theirs[name]).all() for name, tensor in ours.items())


@pytest.mark.parametrize("number", range(len(blocks("choosing.md", "yaml"))))
def test_configs_for_choosing_are_ready(number: int, tmp_path: Path, monkeypatch):
    for seed, name in enumerate(("math", "code")):
        tiny.save_model(tmp_path / name, tiny.CONFIGS["llama"], seed)
        rows = [{"text": text} for text in tiny.sentences(24, seed=seed)]
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    Path("config.yml").write_text(blocks("choosing.md", "yaml")[number])
    assert "is ready to fit" in run("mergekit-dam", "check", "config.yml").stdout
    if "steps: 0" in Path("config.yml").read_text():
        table = run("mergekit-dam", "fit", "config.yml", "--quiet")
        assert table.returncode == 0


def sentences() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| (?!the sentence|---)(.+?\.) \|", text, re.MULTILINE)


@pytest.mark.parametrize("sentence", sentences())
def test_sentences_for_trouble_are_the_codes_own(sentence: str):
    assert any(pattern.fullmatch(sentence.rstrip(".")) for pattern in messages()), sentence


def test_migration_names_keys_and_defaults_that_exist():
    text = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    for key in re.findall(r"`objective\.(\w+)`", text):
        assert key in Objective.model_fields, key
    for key in re.findall(r"`train: \{(\w+):", text):
        assert key in Train.model_fields, key
    known = {*Settings.model_fields, "dtype", "models", "base_model", "columns", "name"}
    for cell in re.findall(r"^\| `--[^|]+\|[^|]*\| `(\w+)` \|", text, re.MULTILINE):
        assert cell in known, cell
    paper = PRESETS["paper"]
    for line in (
        "| 1e-3 | `learning_rate` | for each tensor by how far its sources are apart; "
        f"{paper['learning_rate']} with the preset |",
        f"`{paper['schedule']}` with the preset",
        "| `--per_device_train_batch_size` | 1 | `batch_size` | "
        f"{Settings.model_fields['batch_size'].default}; {paper['batch_size']} with the preset |",
    ):
        assert line in text, line
