"""The README keeps its promises: the quickstart's commands, its table, the file tree."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from commands import run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_dam import table
from mergekit_dam.coefficients import CoefficientFile

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART = ROOT / "examples" / "quickstart"
SKILLS = ("add", "reverse", "sort", "max")


def shell_blocks() -> list[list[str]]:
    """The commands of each ```sh block, split at `&&`."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [[part.strip() for part in block.strip().split("&&")] for block in blocks]


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    """The README's first command, in a copy of the project."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "examples").symlink_to(ROOT / "examples")
    install, command = shell_blocks()[0]
    assert install == "pip install -e . -c constraints.txt"  # what .ci/run does with the tests
    here = Path.cwd()
    os.chdir(folder)
    try:
        result = run(*shlex.split(command))
    finally:
        os.chdir(here)
    header = CoefficientFile(folder / "dam.safetensors").header
    assert table.as_text(header) in result.stdout
    return folder / "merged"


def test_the_fit_keeps_at_most_a_quarter_of_the_averages_divergence(merged):
    results = CoefficientFile(merged / "dam.safetensors").header.results
    average, fit = (sum(f.kl for f in figures) for figures in (results.average, results.fit))
    assert fit <= average / 4


def test_stock_mergekit_writes_the_same_bytes(merged, tmp_path, monkeypatch):
    monkeypatch.chdir(merged.parent)
    run("mergekit-yaml", "examples/quickstart/config.yml", tmp_path / "out", "--quiet")
    for path in merged.glob("*.safetensors"):
        if path.name != "dam.safetensors":
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_the_merge_keeps_the_skills_that_the_average_loses(merged, monkeypatch):
    monkeypatch.syspath_prepend(QUICKSTART)
    import evaluate

    def score(model) -> float:
        tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "base")
        rows = {s: evaluate.read_rows(QUICKSTART / "data" / f"{s}_test.jsonl") for s in SKILLS}
        return sum(evaluate.exact_match(model, tokenizer, rows[s][:50]) for s in SKILLS) / 4

    average = AutoModelForCausalLM.from_pretrained(QUICKSTART / "base", dtype=torch.float32)
    states = [load_file(QUICKSTART / skill / "model.safetensors") for skill in SKILLS]
    average.load_state_dict(
        {name: sum(state[name].float() for state in states) / 4 for name in states[0]}
    )
    ours = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert score(ours) > 0.85
    assert score(average) < 0.5


def test_the_checkpoints_are_small_and_name_no_path():
    for folder in (QUICKSTART / name for name in ("base", *SKILLS)):
        assert (folder / "model.safetensors").stat().st_size <= 2_000_000
        for file in folder.glob("*.json"):
            assert "/home" not in file.read_text() and "/tmp" not in file.read_text()


def test_the_test_command_is_ci():
    install, test = shell_blocks()[1]
    script = (ROOT / ".ci" / "run").read_text()
    assert install.removeprefix("pip install ") in script
    assert test in script


def test_every_command_in_the_table_exists():
    for command in re.findall(r"^\| `mergekit-dam (\w+)", README, re.MULTILINE):
        assert "Usage" in run("mergekit-dam", command, "--help").stdout


def test_the_file_tree_is_true():
    tree = README.partition("```text\n")[2].partition("```")[0]
    told = set(re.findall(r"^\s+([\w.-]+\.(?:py|md|yml))\s", tree, re.MULTILINE))
    tracked = subprocess.run(
        ["git", "ls-files", "mergekit_dam", "docs", "examples"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    ).stdout.split()  # fmt: skip
    real = {Path(name).name for name in tracked if name.endswith((".py", ".md", ".yml"))}
    assert told == real
    for folder in re.findall(r"^\s*([\w/]+)/\s", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir() or (ROOT / "mergekit_dam" / folder).is_dir()
    scripts = sum(name.endswith(".py") for name in tracked)
    assert len(re.findall(r"^\s+[\w]+\.py\s", tree, re.MULTILINE)) == scripts


def test_imports_point_downwards():
    """As the README's tree says; only the plugin reaches up, when mergekit is there."""
    tree = README.partition("mergekit_dam/\n")[2].partition("docs/\n")[0]
    rooms = re.findall(r"^  (\w+)", tree, re.MULTILINE)
    rank = {room: number for number, room in enumerate(rooms)}
    for path in (ROOT / "mergekit_dam").rglob("*.py"):
        room = path.relative_to(ROOT / "mergekit_dam").parts[0].removesuffix(".py")
        imported = re.findall(
            r"^\s*from mergekit_dam(?:\.(\w+))?[\w.]* import ([\w, ]+)",
            path.read_text(),
            re.MULTILINE,
        )
        for package, names in imported:
            for other in [package] if package else names.split(", "):
                if other in rank and room != "plugin":
                    assert rank[other] >= rank[room], f"{path.name} imports {other}"
