"""The benchmarks of docs/performance.md run: on tiny models, whose times say nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = {  # of rows of their tables
    "architectures": ("Mixtral", "recompute: block"),
    "fit_step": ("plain training step", "cached"),
    "merge": ("linear", "dam"),
    "combine": ("merge, plain torch", "gradient, plain torch"),
    "start": ("solving", "foreseen"),
}
ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"`python (-m tests\.benchmarks\.\w+)`", PAGE)))


def test_the_page_names_them() -> None:
    assert {command.rpartition(".")[2] for command in COMMANDS} == set(NAMES)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_prints_its_table(command: str) -> None:
    arguments = [*command.split(), "--shape", "tiny", "--repeat", "1"]
    arguments += ["--length", "16"] if command.endswith(("fit_step", "start")) else []
    arguments += ["--only", "Mixtral"] if command.endswith("architectures") else []
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=240
    )
    assert done.returncode == 0, done.stderr
    names = NAMES[command.rpartition(".")[2]]
    assert all(name in done.stdout for name in names), done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="tells glibc what to give back")
def test_a_process_takes_about_the_memory_that_was_predicted() -> None:
    """Where its allocator gives back what is free; by default glibc keeps a part of that."""
    command = "-m tests.benchmarks.fit_step --shape small --length 256 --repeat 1 --offload none"
    done = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True, cwd=ROOT, check=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if "recompute:" in line]
    assert len(rows) == 5
    for name, *_, peak, predicted in rows:
        assert float(peak) == pytest.approx(float(predicted), rel=0.25), name
