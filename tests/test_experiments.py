"""The scenarios make sound checkpoints; the driver runs `compare` on them and collects tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
import yaml
from mergekit.options import MergeOptions

from mergekit_dam.check import check
from mergekit_dam.compare import records
from mergekit_dam.config import read_recipe

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "examples" / "experiments"


@pytest.fixture(scope="module")
def driver():
    """examples/experiments/run.py, whose scenarios take a hundredth of the steps and few rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS)
        import making
        import run

        patch.setattr(making, "SHARE", 0.005)
        patch.setattr(making, "ROWS", 24)
        yield run
        torch.use_deterministic_algorithms(False)  # which the scenarios switch on


@pytest.mark.parametrize(
    "scenario", ["far", "close", "weak", "two", "eight", "domains", "tied", "lora"]
)
def test_a_scenario_is_ready_to_be_compared(driver, scenario, tmp_path):
    config = driver.SCENARIOS[scenario](tmp_path / "made", 0)
    recipe = read_recipe(str(config))
    options = MergeOptions(quiet=True, lora_merge_cache=str(tmp_path / "lora"))
    check(
        recipe, options, coefficients=recipe.coefficients, will_fit=True, will_merge=False,
        device="cpu", in_full=True,
    )  # fmt: skip
    count = {"two": 2, "eight": 8, "domains": 3, "tied": 3, "lora": 3}.get(scenario, 4)
    assert len(recipe.settings.data) == count
    own = json.loads((tmp_path / "made" / "base" / "config.json").read_text())
    assert own["tie_word_embeddings"] == (scenario == "tied")
    weights = sum(p.numel() for p in tiny.load(tmp_path / "made" / "base").parameters())
    assert weights < 1_000_000
    assert (tmp_path / "made" / "reverse" / "adapter_config.json").exists() == (scenario == "lora")


def test_scenarios_are_seeded(driver, tmp_path):
    made = [driver.SCENARIOS["two"](tmp_path / str(i), seed) for i, seed in enumerate((1, 1, 2))]
    weights = [(config.parent / "sort" / "model.safetensors").read_bytes() for config in made]
    assert weights[0] == weights[1] != weights[2]


def test_the_driver_compares_collects_and_goes_on(driver, tmp_path, monkeypatch, capsys):
    everything = ["run.py", "--out", str(tmp_path), "--scenarios", "two", "--seeds", "0,1"]
    small = ["--search-rows", "4", "--evaluations", "3"]
    monkeypatch.setattr(driver, "FITS", {"dam short": {"steps": 1}})
    small += ["--only", "linear,dam short"]
    monkeypatch.setattr(sys, "argv", [*everything, *small])
    driver.main()
    page = (tmp_path / "tables.md").read_text()
    found = [
        records.read(tmp_path / f"two-{seed}" / "compared" / "results.json") for seed in (0, 1)
    ]
    for name in ("linear", "dam short"):
        kl = sum(records.mean(results.find(name), "kl") for results in found) / 2
        assert f"| {name} | {kl:.4f} ±" in page
    assert "2 seeds" in page and "| two |" in page
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*everything, *small, "--again", "dam short"])
    driver.main()
    said = capsys.readouterr().out
    assert "two 0: dam short: KL" in said and "two 0: linear: KL" not in said


def test_a_scenario_is_a_command(tmp_path):
    for script in sorted(EXPERIMENTS.glob("*.py")):
        if script.stem not in ("making", "run"):
            assert '__name__ == "__main__"' in script.read_text()
    command = [sys.executable, str(EXPERIMENTS / "tied.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert "--seed" in result.stdout and "Tied embeddings" in result.stdout


def answer(folder: Path, prompt: str) -> str:
    """As long as the task of docs/experiments.md lets it be."""
    model = tiny.load(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    given = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(given, skip_special_tokens=True)


def test_lm_eval_scores_a_merge(tmp_path):
    """The command of docs/experiments.md, with one tiny task from local files."""
    model = tiny.save_model(tmp_path / "merged", tiny.CONFIGS["llama"], 0)
    rows = [
        {"prompt": text, "completion": answer(model, text) + "." * (number % 2)}
        for number, text in enumerate(tiny.sentences(4, 0))
    ]
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    page = (ROOT / "docs" / "experiments.md").read_text()
    task = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    task["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "rows.jsonl")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(yaml.safe_dump(task))
    line = next(line for line in page.splitlines() if line.startswith("    lm_eval "))
    arguments = line.replace("./merged", str(model)).replace("./tasks", str(tmp_path / "tasks"))
    result = subprocess.run(
        [sys.executable, "-m", *arguments.split()], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if "exact_match" in line)
    assert "0.5" in line.split("|")[7]
