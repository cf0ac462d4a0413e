"""The benchmarks of docs/performance.md run: on tiny models, whose times say nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"`python (-m tests\.benchmarks\.\w+)`", PAGE)))


def test_the_page_names_them() -> None:
    assert len(COMMANDS) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_prints_its_table(command: str) -> None:
    arguments = [*command.split(), "--shape", "tiny", "--repeat", "1"]
    arguments += ["--length", "16"] if command.endswith("fit_step") else []
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=240
    )
    assert done.returncode == 0, done.stderr
    names = ["plain training step", "cached"] if command.endswith("fit_step") else ["linear", "dam"]
    assert all(name in done.stdout for name in names), done.stdout
