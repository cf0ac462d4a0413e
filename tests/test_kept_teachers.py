"""Teachers whose states are kept on disk: the same fit, without their passes in each step."""

import os
from pathlib import Path

import pytest
import tiny
import torch
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from mergekit_dam.check import check, estimate
from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.config import read_recipe
from mergekit_dam.errors import DamError
from mergekit_dam.fingerprint import is_whole
from mergekit_dam.fit import fit, stage, teachers
from mergekit_dam.fit.batches import StepRows
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.fit.resume import RECORD
from mergekit_dam.fit.trainer import CoefficientTrainer
from mergekit_dam.model import MergedModel

QUIET = MergeOptions(quiet=True)
CACHED = {"teacher": "cached", "steps": 8, "batch_size": 4, "checkpoint_every": 2}


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(teachers, "TOKENS", 60)


@pytest.fixture
def path(recipe, tmp_path) -> str:
    models = tiny.save_models(tmp_path, tiny.CONFIGS["gemma2"], 2)
    return str(recipe(models, dam=CACHED))


def fitted(path: str, out: Path, **options) -> CoefficientFile:
    fit(read_recipe(path), str(out), QUIET, device="cpu", **options)
    return CoefficientFile(out)


def test_the_fit_is_that_of_live_teachers(recipe, path, tmp_path):
    cached = fitted(path, tmp_path / "cached.safetensors")
    text = Path(path).read_text().replace("teacher: cached", "teacher: live")
    Path(path).write_text(text)
    live = fitted(path, tmp_path / "live.safetensors")
    for name in live.names:
        torch.testing.assert_close(cached.get(name), live.get(name), rtol=0, atol=1e-4)
    assert not list(tmp_path.glob("*.teachers"))


def test_no_teacher_runs_in_a_step(path, tmp_path, monkeypatch):
    taught, states, step = [], MergedModel.all_states, CoefficientTrainer.training_step
    in_step = False

    def watched(self, passes):
        if in_step:
            taught.extend(view for _, view in passes)
        return states(self, passes)

    def stepping(self, *args, **kwargs):
        nonlocal in_step
        in_step = True
        result = step(self, *args, **kwargs)
        in_step = False
        return result

    monkeypatch.setattr(MergedModel, "all_states", watched)
    monkeypatch.setattr(CoefficientTrainer, "training_step", stepping)
    fitted(path, tmp_path / "out.safetensors")
    assert set(taught) == {None}


def test_killed_while_keeping_it_goes_on_and_ends_the_same(path, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    fitted(path, whole)
    written, write = [], teachers.KeptTeachers._write

    def killed(self, file, *args):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(file.name)
        write(self, file, *args)

    with monkeypatch.context() as patch:
        patch.setattr(teachers.KeptTeachers, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            fitted(path, out)
    again = []
    monkeypatch.setattr(
        teachers.KeptTeachers,
        "_write",
        lambda self, file, *args: again.append(file.name) or write(self, file, *args),
    )
    fitted(path, out, resume=True)
    assert again and not set(again) & set(written)
    assert out.read_bytes() == whole.read_bytes()


def test_a_full_disk_is_told_and_leaves_no_half_file(path, tmp_path, monkeypatch):
    write, written = Path.write_bytes, []

    def full(file, data):
        write(file, data)
        if file.parent.suffix != ".teachers":
            return
        if len(written) == 2:
            os.truncate(file, 100)
            raise OSError(28, "No space left on device")
        written.append(file)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DamError, match=r"No space left.*make room"):
        fitted(path, tmp_path / "out.safetensors")
    kept = list((tmp_path / "out.safetensors.teachers").iterdir())
    assert len(kept) == 2
    assert all(is_whole(file) for file in kept)
    assert not (tmp_path / "out.safetensors").exists()


def test_killed_while_writing_it_leaves_nothing_that_is_not_removed(path, tmp_path, monkeypatch):
    """A file that safetensors writes by itself would have another name until it is whole."""
    write, named = Path.write_bytes, []

    def killed(file, data):
        write(file, data)
        if file.parent.suffix == ".teachers":
            named.append(file.name)
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        fitted(path, tmp_path / "out.safetensors")
    assert teachers.FILE.fullmatch(named[0])


@pytest.mark.parametrize("damage", [b"", bytes(200), b"[]"])
def test_a_damaged_file_is_computed_again(path, tmp_path, damage):
    prepared = prepare(read_recipe(path), QUIET, device="cpu")
    kept = teachers.KeptTeachers(prepared.merged, tmp_path / "kept", "")
    rows = [source.train for source in prepared.data]
    kept.keep(rows)
    file = next((tmp_path / "kept").iterdir())
    sound = file.read_bytes()
    file.write_bytes(damage)
    kept.keep(rows)
    assert file.read_bytes() == sound


def test_rows_that_are_grouped_otherwise_have_other_files(path, tmp_path):
    """Their states differ in their last bits."""
    prepared = prepare(read_recipe(path), QUIET, device="cpu")
    found = []
    for at_once in ((60, 4), (60, 4), (60, 1), (30, 4)):
        kept = teachers.KeptTeachers(prepared.merged, tmp_path / "kept", "", *at_once)
        kept.keep([source.train for source in prepared.data])
        found.append(frozenset(kept._files.values()))
    assert found[0] == found[1]
    assert len(set(found)) == 3
    assert set((tmp_path / "kept").iterdir()) == found[-1]


def killed(*_) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["before the checkpoints", "before the folders"])
def test_killed_at_its_very_end_a_fit_leaves_nothing(path, tmp_path, monkeypatch, moment):
    out = tmp_path / "out.safetensors"
    states, folder = Path(f"{out}.teachers"), Path(f"{out}.fit")
    if moment == "before the checkpoints":
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(stage, "discard", killed)
            fitted(path, out)
        assert not states.exists()
        assert (folder / RECORD).exists()
    else:
        fitted(path, out)
        folder.mkdir()
        states.mkdir()
        (states / f"0-{'a' * 24}.safetensors").touch()
    fitted(path, out, resume=True)
    assert list(tmp_path.glob("out.*")) == [out]


def test_other_data_or_sources_have_other_files(path, tmp_path):
    def names(changed: str = "") -> set[str]:
        recipe = read_recipe(path)
        prepared = prepare(recipe, QUIET, device="cpu")
        from mergekit_dam.fit.stage import _teaching

        kept = teachers.KeptTeachers(prepared.merged, tmp_path / "kept", _teaching(prepared))
        kept.keep(teachers.rows_of_a_fit(StepRows(prepared.data), recipe.settings, 1))
        return {file.name for file in set(kept._files.values())}

    first = names()
    assert names() == first
    tiny.save_model(tmp_path / "m1", tiny.CONFIGS["gemma2"], seed=9)
    assert not first & names()


@pytest.mark.parametrize("loss_on", ["all", "completion"])
def test_their_size_on_disk_is_foreseen(recipe, tmp_path, loss_on):
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    rows = [{"prompt": text, "completion": text[:2]} for text in tiny.sentences(20, 0)]
    data = {"path": str(tiny.write_jsonl(tmp_path / "rows.jsonl", rows)), "loss_on": loss_on}
    recipe = read_recipe(str(recipe(models, dam={**CACHED, "data": data})))
    options = {"coefficients": "none", "will_fit": True, "will_merge": False, "device": "cpu"}
    told = check(recipe, QUIET, **options, in_full=True).estimate.states
    prepared = prepare(recipe, QUIET, device="cpu")
    kept = teachers.KeptTeachers(prepared.merged, tmp_path / "kept", "")
    kept.keep(teachers.rows_of_a_fit(StepRows(prepared.data), prepared.settings, 1))
    tensors = [load_file(path) for path in (tmp_path / "kept").iterdir()]
    assert told == sum(t.nbytes for file in tensors for t in file.values())


def test_each_of_several_processes_keeps_its_share(path, tmp_path, monkeypatch):
    recipe = read_recipe(path)
    prepared = prepare(recipe, QUIET, device="cpu")
    rows = [source.train for source in prepared.data]
    monkeypatch.setenv("WORLD_SIZE", "2")
    written = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        own = teachers.KeptTeachers(prepared.merged, tmp_path / "kept", "")
        before = set((tmp_path / "kept").glob("*"))
        own.keep(rows, lambda b=before: written.append(set((tmp_path / "kept").glob("*")) - b))
        if rank == 0:  # alone, it has written the other's at last
            for file in (tmp_path / "kept").iterdir():
                if file not in written[1]:
                    file.unlink()
    before, first, again, second = written  # each waits before it writes, and for the others
    assert not before | again
    assert abs(len(first) - len(second)) <= 1
    assert not first & second
    assert {file.name for file in first | second} == {file.name for file in own._files.values()}


def test_what_another_fit_has_left_makes_room(path, tmp_path):
    prepared = prepare(read_recipe(path), QUIET, device="cpu")
    rows = [source.train for source in prepared.data]
    for fingerprint in ("earlier", "now"):
        kept = teachers.KeptTeachers(prepared.merged, tmp_path / "kept", fingerprint)
        kept.keep(rows)
    assert set((tmp_path / "kept").iterdir()) == set(kept._files.values())


def test_a_disk_that_is_too_small_is_told_before_a_teacher_runs(path, tmp_path, monkeypatch):
    prepared = prepare(read_recipe(path), QUIET, device="cpu")
    rows = [source.train for source in prepared.data]
    merged = prepared.merged
    needed = teachers.bytes_of(rows, 16, merged.dtype)
    kept = teachers.KeptTeachers(merged, tmp_path / "kept", "")
    with monkeypatch.context() as patch:
        patch.setattr(teachers, "free_disk", lambda folder: needed - 1)
        patch.setattr(teachers.KeptTeachers, "_write", None)
        with pytest.raises(DamError, match=r"need .* are free: make room, or set `dam.teacher"):
            kept.keep(rows)
    monkeypatch.setattr(teachers, "free_disk", lambda folder: needed)
    kept.keep(rows)
    monkeypatch.setattr(teachers, "free_disk", lambda folder: 0)
    kept.keep(rows)  # all is there


def test_check_tells_of_a_disk_that_is_too_small(path, monkeypatch):
    options = {"coefficients": "none", "will_fit": True, "will_merge": False, "device": "cpu"}
    told = str(check(read_recipe(path), QUIET, **options, in_full=True))
    assert "of the disk" not in told
    monkeypatch.setattr(estimate, "free_disk", lambda path: 1000)
    told = str(check(read_recipe(path), QUIET, **options, in_full=True))
    assert "of the disk, which has room for 1 KB: make more, or set `dam.teacher: live`" in told


def test_a_file_in_the_folders_place(path, tmp_path):
    recipe = read_recipe(path)
    states = Path(f"{recipe.coefficients}.teachers")
    states.touch()
    options = {"coefficients": recipe.coefficients, "will_fit": True, "will_merge": False}
    with pytest.raises(DamError, match=r"\.teachers is a file, where .*: move it away"):
        check(recipe, QUIET, **options, device="cpu")
    with pytest.raises(DamError, match=r"cannot be kept in .*\.teachers .*File exists"):
        fit(recipe, recipe.coefficients, QUIET, device="cpu")


def test_foreign_files_in_the_folder_stay(path, tmp_path):
    folder = tmp_path / "out.safetensors.teachers"
    folder.mkdir()
    (folder / "mine.safetensors").write_text("mine")
    fitted(path, tmp_path / "out.safetensors")
    assert [file.name for file in folder.iterdir()] == ["mine.safetensors"]


def test_the_rows_of_a_fit_are_those_that_its_steps_see(path, tmp_path, monkeypatch):
    recipe = read_recipe(path)
    prepared = prepare(recipe, QUIET, device="cpu")
    rows = StepRows(prepared.data)
    few = recipe.settings.model_copy(update={"steps": 2})
    assert [len(own) for own in teachers.rows_of_a_fit(rows, few, 1)] == [8, 8]
    everything = teachers.rows_of_a_fit(rows, recipe.settings, 1)
    assert [len(own) for own in everything] == [len(own) for own in rows.lengths]
