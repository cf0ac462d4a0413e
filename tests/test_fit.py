"""The fit: what it changes, that it is reproducible, and that it survives being killed."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from commands import SCRIPTS, kill_when, refusal, run
from mergekit.options import MergeOptions
from safetensors import SafetensorError

from mergekit_dam import losses
from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.config import read_recipe
from mergekit_dam.config.settings import Objective
from mergekit_dam.data import Row
from mergekit_dam.errors import DamError
from mergekit_dam.fit import alone as alone_module
from mergekit_dam.fit import fit, stage
from mergekit_dam.fit.alone import alone
from mergekit_dam.fit.batches import batch
from mergekit_dam.fit.calibration import _go_as_far_as_helps
from mergekit_dam.fit.evaluate import evaluate
from mergekit_dam.fit.interrupt import Interrupt
from mergekit_dam.fit.objective import Distillation
from mergekit_dam.fit.prepare import prepare
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


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_fit_changes_the_coefficients_and_nothing_else(recipe, models, tmp_path):
    before = [contents(folder) for folder in models]
    path = str(recipe(models))
    start = prepare(read_recipe(path), QUIET, device="cpu").merged.coefficients()
    fit(read_recipe(path), str(tmp_path / "out.safetensors"), QUIET, device="cpu")
    file = CoefficientFile(tmp_path / "out.safetensors")
    assert file.names == set(start)
    for name, coefficient in start.items():
        assert not torch.equal(file.get(name), coefficient.detach()), name
    assert [contents(folder) for folder in models] == before


def test_a_kind_left_out_keeps_its_start(recipe, models, tmp_path):
    path = recipe(models, dam={"train": {"norm": False}})
    fit(read_recipe(str(path)), str(tmp_path / "out.safetensors"), QUIET, device="cpu")
    file = CoefficientFile(tmp_path / "out.safetensors")
    assert torch.equal(file.get("model.norm.weight"), torch.full((3, 16), 1 / 3))


def test_the_fit_lowers_the_held_out_divergence(recipe, models, tmp_path):
    path = recipe(models, rows=60, dam={"steps": 40, "learning_rate": 0.02})
    header = fit(read_recipe(str(path)), str(tmp_path / "o.safetensors"), QUIET, device="cpu")
    before, after = (
        sum(f.kl for f in figures) for figures in (header.results.average, header.results.fit)
    )
    assert after < 0.9 * before


def test_held_out_figures_are_means_over_all_predicted_tokens(recipe, models):
    fitted = prepare(read_recipe(str(recipe(models))), QUIET, device="cpu")
    held_out = [source.held_out for source in fitted.data]
    for number, (figures, rows) in enumerate(
        zip(evaluate(fitted.merged, held_out, 60, 30), held_out, strict=True)
    ):
        source = tiny.load(models[number])
        kl, nll, tokens = 0.0, 0.0, 0
        for row in rows:
            ids = torch.tensor([row.ids])
            p = source(ids).logits[0, :-1].log_softmax(-1)
            q = fitted.merged(ids)[0, :-1].log_softmax(-1)
            kl += (p.exp() * (p - q)).sum().item()
            nll -= p.gather(1, ids[0, 1:, None]).sum().item()
            tokens += len(row) - 1
        assert figures.tokens == tokens
        assert figures.kl == pytest.approx(kl / tokens, rel=1e-4)
        assert torch.tensor(figures.source_perplexity).log().item() == pytest.approx(
            nll / tokens, rel=1e-4
        )


@pytest.fixture
def distillation(recipe, models) -> Distillation:
    fitted = prepare(read_recipe(str(recipe(models))), QUIET, device="cpu")
    return Distillation(fitted.merged, Objective())


ROWS = [Row([1, 5, 6, 7]), Row([1, 9, 8]), Row([1, 4, 4, 12, 13, 14])]


def test_loss_is_the_sum_over_sources_of_a_mean_over_tokens(distillation):
    terms = distillation(**batch(ROWS, [0, 1, 2]))
    alone = [distillation(**batch([row], [n])) for n, row in enumerate(ROWS)]
    expected = sum(a["loss"] - 0.01 * a["similarity"] for a in alone) + 0.01 * terms["similarity"]
    torch.testing.assert_close(terms["loss"], expected)


def test_a_batch_of_copies_has_the_loss_of_one(distillation):
    once = distillation(**batch(ROWS, [0, 1, 2]))["loss"]
    twice = distillation(**batch([*ROWS, *ROWS], [0, 1, 2] * 2))["loss"]
    torch.testing.assert_close(once, twice)


def test_positions_before_a_rows_start_count_for_nothing(distillation):
    """The start leaves three predictions of eight, as if they were those of three rows."""
    row = Row([1, 4, 4, 12, 13, 14], start=3)
    loss = distillation(**batch([ROWS[0], row], [0, 0]))
    merged, ids = distillation.merged, torch.tensor([row.ids])
    q, p = merged(ids), tiny.teach(merged, 0, ids)
    kept = [
        (merged(torch.tensor([ROWS[0].ids])), tiny.teach(merged, 0, torch.tensor([ROWS[0].ids])))
    ]
    logits = [torch.cat([kept[0][i][0, :-1], (q, p)[i][0, 3:-1]]) for i in (0, 1)]
    torch.testing.assert_close(loss["kl_1"], losses.kl(*logits))


def test_held_out_figures_begin_at_a_rows_start(distillation):
    whole, tail = Row([1, 4, 4, 12, 13, 14]), Row([1, 4, 4, 12, 13, 14], start=4)
    (figures,) = evaluate(distillation.merged, [[tail]], 60, 30)
    assert figures.tokens == 1
    (all_of_it,) = evaluate(distillation.merged, [[whole]], 60, 30)
    assert all_of_it.tokens == 5
    ids = torch.tensor([whole.ids])
    p = tiny.teach(distillation.merged, 0, ids)[0, 4].log_softmax(-1)
    assert figures.source_perplexity == pytest.approx(p[14].neg().exp().item(), rel=1e-5)


def test_what_stands_in_the_padding_is_irrelevant(distillation):
    inputs = batch(ROWS, [0, 1, 2])
    loss = distillation(**inputs)["loss"]
    other = inputs["input_ids"].clone()
    for row, length in enumerate(inputs["lengths"]):
        other[row, length:] = 11
    torch.testing.assert_close(distillation(**{**inputs, "input_ids": other})["loss"], loss)


@pytest.mark.parametrize(
    "term",
    ["reverse_kl", "jsd", "mse", "entropy", "l1", "l2", "overlap", "weighted_overlap"],
)
def test_every_alternative_term_reaches_the_loss(recipe, models, term):
    fitted = prepare(read_recipe(str(recipe(models))), QUIET, device="cpu")
    plain = Distillation(fitted.merged, Objective())(**batch(ROWS, [0, 1, 2]))["loss"]
    objective = Objective(**{term: 0.5})
    terms = Distillation(fitted.merged, objective)(**batch(ROWS, [0, 1, 2]))
    added = sum(value for name, value in terms.items() if name.startswith(term))
    torch.testing.assert_close(terms["loss"], plain + 0.5 * added)
    assert added != 0


def test_the_same_config_and_seed_give_the_same_bytes(recipe, models, tmp_path):
    path = recipe(models)
    for name in ("a", "b"):
        run("mergekit-dam", "fit", path, "--out", tmp_path / name, "--quiet", "--device", "cpu")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_seed_gives_other_coefficients(recipe, models, tmp_path):
    files = []
    for seed in (1, 2):
        out = tmp_path / f"{seed}.safetensors"
        fit(read_recipe(str(recipe(models, dam={"seed": seed}))), str(out), QUIET, device="cpu")
        files.append(CoefficientFile(out).get("model.norm.weight"))
    assert not torch.equal(*files)


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
    SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
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


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_solution_of_no_divergence_is_not_gone_to(value):
    """Nothing is below a NaN, and 0 times infinity is none of the start."""
    coefficient, start = torch.tensor([value, 2.0]), torch.tensor([0.5, 0.5])
    merged = SimpleNamespace(trained_coefficients=lambda: {"w": coefficient})
    _go_as_far_as_helps(merged, {"w": start}, lambda: coefficient.sum().item())
    assert torch.equal(coefficient, start)


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


@pytest.mark.parametrize(
    "dam",
    [{"steps": 1}, {"steps": 20}, {"steps": 2, "warmup": 0.9, "schedule": "polynomial"}],
    ids=str,
)
def test_a_short_fit_wastes_no_step_on_its_warmup(recipe, models, tmp_path, dam):
    out = tmp_path / "dam.safetensors"
    path = recipe(models, dam={**dam, "evaluate_every": 1})
    results = fit(read_recipe(str(path)), str(out), QUIET, device="cpu").results
    found = CoefficientFile(out).get("model.norm.weight")
    assert dam["steps"] > 2 or not torch.equal(found, torch.full((3, 16), 1 / 3))
    assert results.history[-1].step == dam["steps"]
    if len(results.held_out) > 1:
        assert results.held_out[1].kl != results.held_out[0].kl


def test_a_fit_that_is_done_holds_no_memory_when_the_next_begins(
    recipe, models, tmp_path, monkeypatch
):
    alive, made = [], []

    def preparing(*arguments, **options):
        prepared = prepare(*arguments, **options)
        alive.append([earlier() is not None for earlier in made])
        made.append(weakref.ref(prepared.merged))
        return prepared

    monkeypatch.setattr(stage, "prepare", preparing)
    for name in ("a", "b"):
        fit(read_recipe(str(recipe(models))), str(tmp_path / name), QUIET, device="cpu")
    assert alive == [[], [False]]


def test_a_constant_rate_has_its_warmup(recipe, models, tmp_path):
    files = []
    for warmup in (0.0, 0.9):
        dam = {"schedule": "constant", "warmup": warmup, "steps": 4, "learning_rate": 0.01}
        out = tmp_path / f"{warmup}.safetensors"
        fit(read_recipe(str(recipe(models, dam=dam))), str(out), QUIET, device="cpu")
        files.append(CoefficientFile(out).get("model.norm.weight") - 1 / 3)
    assert files[0].abs().max() > 1.5 * files[1].abs().max() > 0


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


def test_a_fit_that_diverges_writes_nothing(recipe, models, tmp_path):
    out = tmp_path / "dam.safetensors"
    run("mergekit-dam", "fit", recipe(models), "--quiet")
    earlier = out.read_bytes()
    path = recipe(models, dam={"learning_rate": 1e30, "steps": 4, "warmup": 0.0})
    assert "dam.learning_rate" in refusal("mergekit-dam", "fit", path)
    assert out.read_bytes() == earlier
    assert not Path(f"{out}.fit").exists()


@pytest.mark.parametrize("what", ["a source's weights", "the config", "a text"])
def test_what_is_no_coefficient_file_is_not_replaced(recipe, models, tmp_path, what):
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    config = recipe(models)
    path = {
        "a source's weights": models[0] / "model.safetensors",
        "the config": config,
        "a text": precious,
    }[what]
    before = path.read_bytes()
    message = refusal("mergekit-dam", "fit", config, "--out", path)
    assert str(path) in message
    assert "no coefficient file" in message
    assert path.read_bytes() == before


def test_places_that_cannot_be_written(recipe, models, tmp_path):
    config = recipe(models)
    assert "is a file" in refusal(
        "mergekit-dam", "fit", config, "--out", config / "dam.safetensors"
    )
    assert "is a folder" in refusal("mergekit-dam", "fit", config, "--out", tmp_path)


def test_two_fits_do_not_write_one_file(recipe, models, tmp_path):
    path, out = str(recipe(models)), tmp_path / "new" / "dam.safetensors"
    with alone(folder_of(out)), pytest.raises(DamError, match=f"Another fit is writing {out} now"):
        fit(read_recipe(path), str(out), QUIET, device="cpu")
    assert not out.parent.exists()
    fit(read_recipe(path), str(out), QUIET, device="cpu")
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EACCES])
def test_a_disk_without_locks_takes_a_fit(tmp_path, monkeypatch, number):
    def refused(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    told, folder = [], folder_of(tmp_path / "dam.safetensors")
    monkeypatch.setattr(alone_module, "WeakFileLock", refused)
    monkeypatch.setattr(alone_module.LOG, "warning", lambda text, *values: told.append(text))
    if number == errno.EACCES:
        with pytest.raises(DamError, match="cannot be written"), alone(folder):
            pass
    else:
        with alone(folder):
            assert "on a disk without locks" in told[0]


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


def test_accumulation_and_epochs(recipe, models, tmp_path):
    """Rows in one batch, or added up over two, make the same steps."""
    results = []
    for name, settings in (
        ("whole", {"batch_size": 4}),
        ("halves", {"batch_size": 2, "accumulation": 2}),
    ):
        keys = {"steps": None, "epochs": 2, "objective": {"similarity": 0, "l2": 1e-3}}
        path = recipe(models, rows=20, dam={**keys, **settings, "held_out": 0.2})
        out = tmp_path / f"{name}.safetensors"
        header = fit(read_recipe(str(path)), str(out), QUIET, device="cpu")
        assert header.results.history[-1].step == 8  # 16 rows, 4 a step, twice
        results.append(CoefficientFile(out))
    assert results[0].names == results[1].names


def test_epochs_of_preset_paper(recipe, models, tmp_path):
    path = recipe(models, rows=20, dam={"preset": "paper", "steps": None, "batch_size": 4})
    out = tmp_path / "paper.safetensors"
    header = fit(read_recipe(str(path)), str(out), QUIET, device="cpu")
    assert header.results.history[-1].step == 4
    assert header.settings["learning_rate"] == 1e-3
    assert header.settings["schedule"] == "constant"


def test_an_earlier_file_is_kept(recipe, models, tmp_path):
    path, out = recipe(models), tmp_path / "dam.safetensors"
    run("mergekit-dam", "fit", path, "--quiet")
    earlier = out.read_bytes()
    run("mergekit-dam", "fit", recipe(models, dam={"seed": 5}), "--quiet")
    assert out.read_bytes() != earlier
    assert (tmp_path / "dam.previous.safetensors").read_bytes() == earlier


def test_steps_zero_writes_the_start(recipe, models, tmp_path):
    path = recipe(models, dam={"steps": 0})
    header = fit(read_recipe(str(path)), str(tmp_path / "o.safetensors"), QUIET, device="cpu")
    assert header.results.average == header.results.fit


def test_task_vectors_need_a_base(recipe, models):
    path = recipe(models, dam={"formula": "task_vectors"})
    assert "base_model" in refusal("mergekit-dam", "fit", path)


@pytest.mark.parametrize("granularity", ["column", "row", "tensor", "element"])
def test_every_granularity_is_fitted_and_recorded(recipe, models, tmp_path, granularity):
    out = tmp_path / "o.safetensors"
    path = recipe(models, dam={"granularity": granularity})
    fit(read_recipe(str(path)), str(out), QUIET, device="cpu")
    file = CoefficientFile(out)
    shapes = {"column": (1, 24), "row": (16, 1), "tensor": (1, 1), "element": (16, 24)}
    assert file.header.granularity == granularity
    assert file.shape("model.layers.0.mlp.down_proj.weight") == (3, *shapes[granularity])
