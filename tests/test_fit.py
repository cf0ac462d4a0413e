"""The fit: what it changes, and that it is reproducible."""

import errno
import math
import os
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from commands import refusal, run
from mergekit.options import MergeOptions

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
from mergekit_dam.fit.objective import Distillation
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.fit.resume import folder_of

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


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_solution_of_no_divergence_is_not_gone_to(value):
    """Nothing is below a NaN, and 0 times infinity is none of the start."""
    coefficient, start = torch.tensor([value, 2.0]), torch.tensor([0.5, 0.5])
    merged = SimpleNamespace(trained_coefficients=lambda: {"w": coefficient})
    _go_as_far_as_helps(merged, {"w": start}, lambda: coefficient.sum().item())
    assert torch.equal(coefficient, start)


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
