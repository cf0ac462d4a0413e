"""The script that makes the quickstart's checkpoints: the same bytes each time."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "quickstart" / "make_specialists.py"


def make(folder: Path) -> dict[str, bytes]:
    steps = ("--base-steps", "3", "--skill-steps", "2")
    command = [sys.executable, str(SCRIPT), "--out", str(folder), *steps]
    # The script has two threads; on a busy machine they should not spin while they wait.
    patient = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run(command, capture_output=True, text=True, env=patient)
    assert result.returncode == 0, result.stderr
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_specialists_are_made_again_byte_for_byte(tmp_path):
    """A few steps of each training; the files kept here took 800."""
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    assert first == second
    assert {"base/model.safetensors", "max/tokenizer.json", "data/add.jsonl"} <= first.keys()
    kept = SCRIPT.parent
    for name in first:  # data, tokenizers and configs do not depend on the steps
        if not name.endswith("model.safetensors"):
            assert first[name] == (kept / name).read_bytes(), name
