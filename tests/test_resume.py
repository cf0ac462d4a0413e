"""A fit that is killed, interrupted or has no room goes on, and ends as if nothing had been."""

import errno
import json
import os
import shutil
import signal
import subprocess
import time
import weakref
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from commands import SCRIPTS, kill_when, refusal, run
from mergekit.options import MergeOptions
from safetensors import SafetensorError

from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.config import read_recipe
from mergekit_dam.errors import DamError
from mergekit_dam.fit import fit, stage
from mergekit_dam.fit.interrupt import Interrupt
from mergekit_dam.fit.resume import (
    BEGINNING,
    PROGRESS,
    RECORD,
    discard,
    folder_of,
    unwritable,
)
from mergekit_dam.fit.trainer import CoefficientTrainer, last_checkpoint

QUIET = MergeOptions(quiet=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    return tiny.save_models(tmp_path_factory.mktemp("models"), tiny.CONFIGS["llama"], 3)


def has_checkpoint(out: Path) -> bool:
    """A whole one, of whichever step: earlier ones are soon removed."""
    return last_checkpoint(Path(f"{out}.fit")) is not None


def test_killed_and_resumed_it_ends_the_same(recipe, models, tmp_path):
    dam = {"steps": 20, "checkpoint_every": 4, "accumulation": 2, "evaluate_every": 3}
    path = recipe(models, dam={**dam, "start": "least_squares"})
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    run("mergekit-dam", "fit", path, "--out", whole, "--quiet")
    command = ["mergekit-dam", "fit", path, "--out", broken, "--quiet"]
    folder = Path(f"{broken}.fit")
    kill_when((folder / "checkpoint-8").exists, *command)
    assert not broken.exists()
    assert list(folder.glob("checkpoint-*"))
    assert "--resume" in refusal(*command)  # rather than lose what was done
    half = folder / "checkpoint-9999"  # as a killed writer would leave it
    half.mkdir()
    (half / "trainer_state.json").write_text("{")
    run(*command, "--resume")
    assert broken.read_bytes() == whole.read_bytes()
    assert not folder.exists()
    before = os.stat(broken).st_mtime_ns
    run(*command, "--resume")  # is finished: nothing to do
    assert os.stat(broken).st_mtime_ns == before


def killed_in_step(number: int, path: Path, out: Path, *, resume: bool = False) -> Path:
    """A fit that was killed in one of its steps, counted from where it begins; returns the folder
    that it left."""
    step, begun = CoefficientTrainer.training_step, []

    def killed(self, *arguments, **options):
        begun.append(self)
        if len(begun) == number:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CoefficientTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(read_recipe(str(path)), str(out), QUIET, device="cpu", resume=resume)
    return folder_of(out)


def checkpoints_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


STEADY = {"steps": 8, "checkpoint_every": 2}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
@pytest.mark.parametrize("damage", ["missing", "half"])
def test_what_a_checkpoint_lacks_is_computed_again(recipe, models, tmp_path, name, damage):
    path, whole, out = recipe(models, dam=STEADY), tmp_path / "whole", tmp_path / "out"
    fit(read_recipe(str(path)), str(whole), QUIET, device="cpu")
    folder = killed_in_step(6, path, out)
    assert checkpoints_in(folder) == ["checkpoint-2", "checkpoint-4"]
    file = folder / "checkpoint-4" / name
    file.unlink() if damage == "missing" else os.truncate(file, file.stat().st_size // 2)
    assert Path(last_checkpoint(folder)).name == "checkpoint-2"
    fit(read_recipe(str(path)), str(out), QUIET, device="cpu", resume=True)
    assert out.read_bytes() == whole.read_bytes()


def test_a_checkpoint_of_which_another_process_wrote_half(recipe, models, tmp_path):
    folder = killed_in_step(6, recipe(models, dam=STEADY), tmp_path / "out")
    (folder / "checkpoint-4" / "rng_state_1.pth").touch()
    assert Path(last_checkpoint(folder)).name == "checkpoint-2"


@pytest.mark.parametrize("damaged", [["checkpoint-4"], ["checkpoint-2", "checkpoint-4"]], ids=str)
def test_a_damaged_checkpoint_is_not_written_over(recipe, models, tmp_path, damaged):
    """Killed meanwhile, that would leave a mix of two."""
    path, out = recipe(models, dam=STEADY), tmp_path / "out"
    folder = killed_in_step(6, path, out)
    for name in damaged:
        os.truncate(folder / name / "optimizer.pt", 100)
    killed_in_step(1, path, out, resume=True)
    assert checkpoints_in(folder) == sorted({"checkpoint-2", "checkpoint-4"} - {*damaged})


@pytest.mark.parametrize("resume", [False, True])
def test_a_checkpoint_that_cannot_be_read_now_is_not_lost(
    recipe, models, tmp_path, monkeypatch, resume
):
    path, out = recipe(models[:2], dam=STEADY), tmp_path / "out.safetensors"
    folder = killed_in_step(5, path, out)
    before, read = checkpoints_in(folder), Path.read_text

    def unreadable(self, *arguments, **keys):
        if self.name == "trainer_state.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return read(self, *arguments, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", unreadable)
        with pytest.raises(DamError, match=r"trainer_state.json cannot be read \(Input/output"):
            fit(read_recipe(str(path)), str(out), QUIET, device="cpu", resume=resume)
    assert before and checkpoints_in(folder) == before


def test_killed_while_it_removes_a_checkpoint_it_leaves_none(recipe, models, tmp_path, monkeypatch):
    folder = killed_in_step(4, recipe(models, dam=STEADY), tmp_path / "out")
    assert checkpoints_in(folder) == ["checkpoint-2"]

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        discard(folder)
    assert checkpoints_in(folder) == ["checkpoint-2"]
    assert last_checkpoint(folder) is None


@pytest.mark.parametrize("resume", [True, False])
def test_killed_before_it_had_its_record_a_fit_begins_anew(recipe, models, tmp_path, resume):
    out = tmp_path / "out"
    folder_of(out).mkdir()
    (folder_of(out) / f".{RECORD}.partial-7").write_text("{")
    (tmp_path / ".out.partial-7").touch()  # of the coefficient file
    fit(read_recipe(str(recipe(models))), str(out), QUIET, device="cpu", resume=resume)
    assert out.exists()
    assert not list(tmp_path.glob("out.*")) + list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("damage", ["missing", "half"])
def test_the_figures_of_a_solved_start_are_measured_again(recipe, models, tmp_path, damage):
    path, whole, out = (
        recipe(models, dam={**STEADY, "start": "least_squares"}),
        *(tmp_path / name for name in ("whole", "out")),
    )
    fit(read_recipe(str(path)), str(whole), QUIET, device="cpu")
    figures = killed_in_step(4, path, out) / BEGINNING
    figures.unlink() if damage == "missing" else os.truncate(figures, 20)
    fit(read_recipe(str(path)), str(out), QUIET, device="cpu", resume=True)
    assert out.read_bytes() == whole.read_bytes()


def test_a_finished_fit_is_the_same_with_what_changes_no_result(
    recipe, models, tmp_path, monkeypatch
):
    out = tmp_path / "dam.safetensors"
    fit(read_recipe(str(recipe(models))), str(out), QUIET, device="cpu")
    monkeypatch.setattr(stage, "_train", None)
    for dam in ({"offload": "disk"}, {"recompute": "block"}):
        path = str(recipe(models, dam=dam))
        fit(read_recipe(path), str(out), QUIET, device="cpu", resume=True)


def of_another(error: Exception) -> Exception:
    other = RuntimeError("half a file")
    other.__cause__ = error
    return other


FULL = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    of_another(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))),
    SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
]


@pytest.mark.parametrize("error", FULL, ids=repr)
@pytest.mark.parametrize("moment", ["checkpoint", "end"])
def test_a_full_disk_is_told_in_words(recipe, models, tmp_path, monkeypatch, error, moment):
    def full(*_):
        raise error

    path, out = recipe(models, dam=STEADY), tmp_path / "out"
    with monkeypatch.context() as patch:
        if moment == "checkpoint":
            patch.setattr(CoefficientTrainer, "_save_checkpoint", full)
        else:
            patch.setattr(stage.files, "save", full)
        with pytest.raises(DamError, match=f"The disk of {tmp_path} is full: make room and go on"):
            fit(read_recipe(str(path)), str(out), QUIET, device="cpu")
    assert folder_of(out).exists() == (moment == "end")  # with what to go on from
    fit(read_recipe(str(path)), str(out), QUIET, device="cpu", resume=True)


@pytest.mark.parametrize("is_full", [True, False])
def test_a_disk_is_looked_at_before_room_is_made(recipe, models, tmp_path, monkeypatch, is_full):
    """torch may tell of a full disk in any words."""

    def failing(*_):
        raise RuntimeError("any words")

    out = tmp_path / "out"
    free = 0 if is_full else 10**12
    monkeypatch.setattr(stage, "free_disk", lambda path: free if path.exists() else 10**12)
    monkeypatch.setattr(CoefficientTrainer, "_save_checkpoint", failing)
    expected = (DamError, "is full") if is_full else (RuntimeError, "^any words$")
    with pytest.raises(expected[0], match=expected[1]):
        fit(read_recipe(str(recipe(models, dam=STEADY))), str(out), QUIET, device="cpu")
    assert not folder_of(out).exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    for number, told in ((errno.ENOSPC, "is full: make room"), (errno.EACCES, "folder of yours")):
        assert told in str(unwritable(tmp_path / "out.fit", OSError(number, "No")))


def test_an_interrupted_fit_says_how_to_go_on(recipe, models, tmp_path):
    path = recipe(models, dam={"steps": 500, "checkpoint_every": 2})
    command = [str(SCRIPTS / "mergekit-dam"), "fit", str(path), "--quiet"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # Processes in a shell's background inherit that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while process.poll() is None and not has_checkpoint(tmp_path / "dam.safetensors"):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in told
    assert "Traceback" not in told


def test_a_start_that_was_killed_goes_on_as_the_same_fit_alone(recipe, models, tmp_path):
    out = tmp_path / "dam.safetensors"
    path = recipe(models, dam={"start": "least_squares", "steps": 1000, "checkpoint_every": 999})
    command = ["mergekit-dam", "fit", path, "--quiet"]
    kill_when((Path(f"{out}.fit") / PROGRESS).exists, *command)
    document = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**document, "dam": {**document["dam"], "seed": 9, "steps": 3}}))
    assert "begun with other settings (dam.seed, dam.steps" in refusal(*command, "--resume")
    solved = (Path(f"{out}.fit") / PROGRESS).read_bytes()
    message = refusal(*command)  # rather than lose what was solved
    assert "interrupted in its least-squares start: continue it with --resume" in message
    assert (Path(f"{out}.fit") / PROGRESS).read_bytes() == solved
    shutil.rmtree(f"{out}.fit")
    run(*command)  # anew, with nothing of the other's
    begun = out.read_bytes()
    run(*command[:-1], "--out", tmp_path / "clean.safetensors", "--quiet")
    assert (tmp_path / "clean.safetensors").read_bytes() == begun


def test_killed_when_its_file_was_written_a_fit_leaves_nothing(
    recipe, models, tmp_path, monkeypatch
):
    recipe_, out = read_recipe(str(recipe(models))), tmp_path / "dam.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_discard_all", lambda folder: None)
        fit(recipe_, str(out), QUIET, device="cpu")
    assert Path(f"{out}.fit").exists()
    fit(recipe_, str(out), QUIET, device="cpu", resume=True)
    assert not Path(f"{out}.fit").exists()


def test_a_finished_fit_leaves_anothers_checkpoints(recipe, models, tmp_path):
    out = tmp_path / "dam.safetensors"
    first = read_recipe(str(recipe(models)))
    fit(first, str(out), QUIET, device="cpu")
    path = recipe(models, dam={"steps": 500, "checkpoint_every": 2})
    kill_when(lambda: has_checkpoint(out), "mergekit-dam", "fit", path, "--quiet")
    fit(first, str(out), QUIET, device="cpu", resume=True)
    assert has_checkpoint(out)


def test_a_fit_is_another_with_another_file_to_start_from(recipe, models, tmp_path):
    start, out = tmp_path / "start.safetensors", tmp_path / "dam.safetensors"
    fit(read_recipe(str(recipe(models))), str(start), QUIET, device="cpu")
    path = recipe(models, dam={"start": str(start)})
    first = fit(read_recipe(str(path)), str(out), QUIET, device="cpu")
    fit(read_recipe(str(recipe(models, dam={"seed": 3}))), str(start), QUIET, device="cpu")
    path = recipe(models, dam={"start": str(start)})
    second = fit(read_recipe(str(path)), str(out), QUIET, device="cpu", resume=True)
    assert first.identity != second.identity


def test_a_fit_is_another_with_another_config_of_the_base(recipe, models, tmp_path):
    """It gives the merge its config, even where it is no source."""
    base, out = tmp_path / "base", tmp_path / "dam.safetensors"
    shutil.copytree(models[0], base)
    path = recipe(models[1:], base_model=str(base), dam={"use_base": False})
    first = fit(read_recipe(str(path)), str(out), QUIET, device="cpu")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    second = fit(read_recipe(str(path)), str(out), QUIET, device="cpu", resume=True)
    assert first.identity != second.identity
    assert first.results.fit != second.results.fit


def test_a_source_that_changes_between_two_fits_of_a_process(recipe, tmp_path):
    own = tiny.save_models(tmp_path / "own", tiny.CONFIGS["llama"], 2)
    path = recipe(own)
    first = fit(read_recipe(str(path)), str(tmp_path / "a"), QUIET, device="cpu")
    tiny.save_model(own[1], tiny.CONFIGS["llama"], seed=9)
    second = fit(read_recipe(str(path)), str(tmp_path / "b"), QUIET, device="cpu")
    expected = fit(read_recipe(str(recipe(own))), str(tmp_path / "c"), QUIET, device="cpu")
    assert second.results == expected.results != first.results
    again = tiny.save_models(tmp_path / "again", tiny.CONFIGS["llama"], 1)
    tiny.save_model(tmp_path / "again" / "m1", tiny.CONFIGS["llama"], seed=9)
    elsewhere = recipe([again[0], tmp_path / "again" / "m1"])
    third = fit(read_recipe(str(elsewhere)), str(tmp_path / "d"), QUIET, device="cpu")
    assert third.results == second.results


@pytest.fixture
def heeded_interrupts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_ends_the_fit_after_its_step(heeded_interrupts):
    steps = 0
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        interrupt.on_step_end(None, None, None)
        steps += 1
        gone = torch.zeros(1)
        watcher = weakref.ref(gone, lambda _: signal.raise_signal(signal.SIGINT))
        del gone
        assert watcher() is None
        interrupt.on_step_end(None, None, None)
        steps += 1
    assert steps == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_breaks_a_write_is_one_still(heeded_interrupts):
    with pytest.raises(KeyboardInterrupt), Interrupt():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            raise RuntimeError("half a file")


def test_a_resumed_fit_refuses_other_settings(recipe, models, tmp_path):
    out = tmp_path / "dam.safetensors"
    path = recipe(models, dam={"steps": 500, "checkpoint_every": 2})
    command = ["mergekit-dam", "fit", path, "--quiet"]
    kill_when(lambda: has_checkpoint(out), *command)
    document = yaml.safe_load(path.read_text())
    document["dam"]["learning_rate"] = 0.5
    path.write_text(yaml.safe_dump(document))
    assert "dam.learning_rate" in refusal(*command, "--resume")


def test_a_finished_fit_is_not_taken_for_another(recipe, models, tmp_path):
    """Other rows or another dtype make another fit, which --resume does not pass over."""
    out = tmp_path / "dam.safetensors"
    run("mergekit-dam", "fit", recipe(models), "--quiet")
    first = CoefficientFile(out).header
    run("mergekit-dam", "fit", recipe(models, rows=30), "--quiet", "--resume")
    second = CoefficientFile(out).header
    run("mergekit-dam", "fit", recipe(models, rows=30, dtype="bfloat16"), "--quiet", "--resume")
    third = CoefficientFile(out).header
    assert len({first.identity, second.identity, third.identity}) == 3
    assert first.results != second.results != third.results


@pytest.mark.parametrize("damage", ["missing", "half"])
def test_checkpoints_that_nothing_tells_of(recipe, models, tmp_path, damage):
    path = recipe(models, dam={"steps": 500, "checkpoint_every": 2})
    command = ["mergekit-dam", "fit", path, "--quiet"]
    folder = tmp_path / "dam.safetensors.fit"
    kill_when(lambda: has_checkpoint(tmp_path / "dam.safetensors"), *command)
    record = folder / "fit.json"
    record.unlink() if damage == "missing" else record.write_text(record.read_text()[:40])
    assert "remove the folder to start over" in refusal(*command, "--resume")
