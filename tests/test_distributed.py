"""Two processes of torchrun: a fit is that of one at the same global batch, a chain of merges goes
through, and neither waits for ever."""

import os
import subprocess
import sys
import threading
import types

import psutil
import pytest
import tiny
import torch
import yaml
from commands import run
from mergekit.options import MergeOptions

from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.config import read_recipe
from mergekit_dam.errors import DamError
from mergekit_dam.fit import fit, processes, trainer
from mergekit_dam.fit.device import choose_device
from mergekit_dam.fit.processes import launch_problems, wait_for

ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "bf16"}  # as `accelerate launch` may say


def torchrun(*arguments: object) -> str:
    """Two processes on the CPU, each with a thread of its own."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "mergekit_dam"]
    result = subprocess.run(
        [*map(str, command), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **ACCELERATE},
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


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


@pytest.mark.parametrize(
    "name, value", [("ACCELERATE_USE_FSDP", "true"), ("ACCELERATE_DYNAMO_BACKEND", "inductor")]
)
def test_what_accelerate_may_not_do_with_the_model_is_told(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    (told,) = launch_problems()
    assert told.startswith(f"`accelerate launch` is set up with {name}={value}, but")
    monkeypatch.setenv(name, {"true": "False"}.get(value, "NO"))
    assert not list(launch_problems())


@pytest.fixture
def one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.mark.parametrize("rank", ["0", "3"])
def test_each_process_takes_the_gpu_that_accelerate_gives_it(one_gpu, monkeypatch, rank):
    """Also where each sees no other, as schedulers of clusters have it."""
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert choose_device("auto") == choose_device("cuda") == choose_device("cuda:0") == "cuda:0"
    with pytest.raises(DamError, match="CUDA_VISIBLE_DEVICES=3 and give --device cuda"):
        choose_device("cuda:3")


def test_what_accelerate_keeps_on_the_cpu_stays_there(one_gpu, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(DamError, match="--device cuda: accelerate is set up for the CPU"):
        choose_device("cuda")


def test_a_trainer_on_another_device_is_told(recipe, tmp_path, monkeypatch):
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    arguments = types.SimpleNamespace(device=torch.device("meta"))
    monkeypatch.setattr(trainer, "_arguments", lambda *_: arguments)
    with pytest.raises(DamError, match="The fit computes on cpu, and accelerate chose meta"):
        fit(read_recipe(str(recipe(models))), str(tmp_path / "out"), MergeOptions(quiet=True))


def test_accelerate_launches_it(recipe, tmp_path):
    """In whatever precision it is set up for: the fit's is `dam.compute_dtype`."""
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    path, files = recipe(models), [tmp_path / name for name in ("plain", "launched")]
    run("mergekit-dam", "fit", path, "--out", files[0], "--device", "cpu", "--quiet")
    launch = ["accelerate", "launch", "--cpu", "--mixed_precision", "bf16"]
    arguments = ["fit", path, "--out", files[1], "--device", "cpu"]
    run(*launch, "-m", "mergekit_dam", *arguments, OMP_NUM_THREADS="1")
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_chain_waits_for_its_merges_and_rows(tmp_path):
    """One process merges and writes rows; the other's next step reads what comes of it."""
    m0, m1 = map(str, tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2))
    soup = {"name": "soup", "merge_method": "linear", "dtype": "float32"}
    soup["models"] = [{"model": name, "parameters": {"weight": 1.0}} for name in (m0, m1)]
    fitted = {
        "merge_method": "dam",
        "models": [{"model": "soup"}, {"model": m1}],
        "parameters": {"coefficients": str(tmp_path / "dam.safetensors")},
        "dtype": "float32",
        "dam": {"steps": 2, "batch_size": 1, "data": {"generate": 12}, "max_length": 16},
    }
    (tmp_path / "chain.yml").write_text(yaml.safe_dump_all([soup, fitted]))
    said = torchrun("run", tmp_path / "chain.yml", tmp_path / "out", "--device", "cpu")
    assert said.count("The merged model is in") == 2
    for folder in ("out", "out.steps/soup"):
        tiny.load(tmp_path / folder)


def test_who_waits_says_so_and_ends(tmp_path, monkeypatch):
    told, path = [], tmp_path / "rows"
    monkeypatch.setattr(processes.LOG, "warning", lambda text, *values: told.append(text % values))
    threading.Timer(0.3, path.touch).start()
    wait_for(path, path.exists, pause=0.01)
    assert not told
    monkeypatch.setattr(processes, "PATIENCE", 0)
    monkeypatch.setattr(processes, "LIMIT", 0.2)
    with pytest.raises(DamError, match="nothing did not appear within"):
        wait_for("nothing", lambda: False, pause=0.01)
    assert told == ["Process 0 waits for nothing, which the main process makes."]


def test_who_waits_ends_with_what_has_launched_it(monkeypatch):
    launchers = iter([4, 4, 1, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(launchers))
    with pytest.raises(DamError, match="what launched the processes has ended"):
        wait_for("nothing", lambda: False, pause=0.01)
    wait_for("something", lambda: True)


WAITING = """
import time
from mergekit_dam.launcher import end_with_launcher
end_with_launcher()
print("waits", flush=True)
time.sleep(60)
"""


def launched(*arguments: str, **environment: str) -> subprocess.Popen:
    """A process that starts another Python, with these arguments."""
    launcher = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
    return subprocess.Popen(
        [sys.executable, "-c", launcher, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("is_launched", [True, False])
def test_a_process_of_torchruns_ends_with_it(is_launched):
    process = launched("-c", WAITING, **({"TORCHELASTIC_RUN_ID": "none"} if is_launched else {}))
    assert process.stdout.readline() == "waits\n"
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    gone, _ = psutil.wait_procs([child], timeout=20 if is_launched else 3)
    assert bool(gone) == is_launched
    if not gone:
        child.kill()
    assert ("What launched this process has ended" in process.stderr.read()) == is_launched


def test_a_command_of_torchruns_ends_with_it_from_its_first_moment_on(tmp_path):
    """Also in the seconds in which it imports mergekit."""
    (tmp_path / "mergekit.py").write_text(
        "import time; print('imports', flush=True); time.sleep(60)"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = launched("-m", "mergekit_dam", TORCHELASTIC_RUN_ID="none", PYTHONPATH=path)
    assert process.stdout.readline() == "imports\n"
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    gone, alive = psutil.wait_procs([child], timeout=20)
    for left in alive:
        left.kill()
    assert gone
