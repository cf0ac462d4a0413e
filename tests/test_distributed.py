"""Two processes of torchrun against one at the same global batch."""

import os
import subprocess
import sys

import pytest
import tiny
import torch
from commands import run

from mergekit_dam.coefficients import CoefficientFile


def torchrun(*arguments: object) -> None:
    """Two processes on the CPU, each with a thread of its own."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "mergekit_dam"]
    result = subprocess.run(
        [*map(str, command), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "dam",
    [
        {"offload": "disk"},
        {"teacher": "cached", "start": "least_squares", "evaluate_every": 2},
    ],
    ids=str,
)
def test_two_processes_fit_what_one_does(recipe, tmp_path, dam):
    """Rows of different length and an odd number of them, so that the processes' shares differ."""
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    shared = {"steps": 6, "checkpoint_every": 2, "max_grad_norm": 0.1, **dam}
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    path = recipe(models, rows=27, dam={**shared, "batch_size": 4})
    run("mergekit-dam", "fit", path, "--out", one, "--device", "cpu", "--quiet")
    path = recipe(models, rows=27, dam={**shared, "batch_size": 2})
    before = set(tmp_path.iterdir())
    torchrun("fit", path, "--out", two, "--device", "cpu")
    assert set(tmp_path.iterdir()) - before == {two, *tmp_path.glob("two.*")}
    assert not (tmp_path / "two.safetensors.fit").exists()
    first, second = CoefficientFile(one), CoefficientFile(two)
    moved = 0.0
    for name in first.names:
        torch.testing.assert_close(second.get(name), first.get(name), rtol=0, atol=2e-5)
        moved = max(moved, float((first.get(name) - 0.5).abs().max()))
    assert moved > 1e-2
    curve, other = (file.header.results.history for file in (first, second))
    assert [point.step for point in curve] == [point.step for point in other]
    assert [point.loss for point in curve] == pytest.approx([p.loss for p in other], rel=1e-4)
