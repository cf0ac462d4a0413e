"""The least-squares start: its solutions against dense ones, and what it does for a merge."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from commands import refusal, run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mergekit.options import MergeOptions

from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.config import read_recipe
from mergekit_dam.fit import fit
from mergekit_dam.fit.calibration import calibrate
from mergekit_dam.fit.evaluate import evaluate
from mergekit_dam.fit.prepare import Fit, prepare
from mergekit_dam.fit.resume import PROGRESS
from mergekit_dam.formula import coefficient_shape, combine
from mergekit_dam.inputs import Inputs
from mergekit_dam.least_squares import least_squares
from mergekit_dam.least_squares.layers import layers
from mergekit_dam.least_squares.objective import (
    EmbeddingObjective,
    LayerObjective,
    LinearObjective,
    NormObjective,
)
from mergekit_dam.least_squares.problem import Problem
from mergekit_dam.least_squares.solve import solve
from mergekit_dam.model import Block

QUIET = MergeOptions(quiet=True)
GRANULARITIES = ("column", "row", "tensor", "element")
OUT, IN, N, TOKENS = 5, 4, 3, 40


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 100 * sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def tensors(*shape: int, base: bool = False, seed: int = 0) -> Inputs:
    sources = tuple(random(*shape, seed=seed + index) for index in range(N))
    subtracted = random(*shape, seed=seed + 9) if base else None
    return Inputs(sources, subtracted, None)


def tokens() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What goes into a layer and what should come out, of each source."""
    return [(random(TOKENS, IN, seed=n), random(TOKENS, OUT, seed=n + 5)) for n in range(N)]


def linear(axis: int, bias: bool) -> LinearObjective:
    objective = LinearObjective("w", "b" if bias else None, axis)
    for x, y in tokens():
        objective.add(x, y, 1 / TOKENS)
    return objective


def starts(layer: dict[str, Inputs], granularity: str, axis: int = -1) -> dict[str, torch.Tensor]:
    return {
        name: torch.full(
            (
                N,
                *coefficient_shape(
                    s.sources[0].shape, granularity, input_axis=axis, bias=name == "b"
                ),
            ),
            1 / N,
            dtype=torch.float64,
        )
        for name, s in layer.items()
    }


Layer = dict[str, Inputs]
Coefficients = dict[str, torch.Tensor]
Loss = Callable[[Coefficients], torch.Tensor]  # of a layer's weights


def weights_of(layer: Layer, coefficients: Coefficients) -> Coefficients:
    weights = {}
    for name, c in coefficients.items():
        s = layer[name]
        base = 0 if s.base is None else s.base
        weights[name] = base + sum(k * (d - base) for k, d in zip(c, s.sources, strict=True))
    return weights


def dense(loss: Loss, layer: Layer, start: Coefficients, ridge: float) -> torch.Tensor:
    """All coefficients, by the normal equations of what the layer should compute: the second
    derivatives by autograd."""
    sizes = [c.numel() for c in start.values()]

    def f(flat: torch.Tensor) -> torch.Tensor:
        parts = zip(start.items(), flat.split(sizes), strict=True)
        return loss(weights_of(layer, {name: part.reshape(c.shape) for (name, c), part in parts}))

    flat = torch.cat([c.flatten() for c in start.values()])
    hessian = torch.autograd.functional.hessian(f, flat)
    gradient = torch.autograd.functional.jacobian(f, flat)
    means = [part.mean() for part in hessian.diagonal().split(sizes)]
    penalty = torch.cat([ridge * m.expand(size) for m, size in zip(means, sizes, strict=True)])
    return flat - torch.linalg.solve(hessian + torch.diag(penalty), gradient)


def require_the_dense_solution(
    objective: LayerObjective, loss: Loss, layer: Layer, start: Coefficients
) -> None:
    problem = Problem(objective, layer, torch.float64)
    found = solve(problem, start, 0.01, iterations=500, tolerance=1e-9)
    flat = torch.cat([c.flatten() for c in found.values()])
    expected = dense(loss, layer, start, 0.01)
    torch.testing.assert_close(flat, expected, rtol=2e-4, atol=2e-4)
    first, last = (float(loss(weights_of(layer, c))) for c in (start, found))
    assert problem.beside(start)(found) == pytest.approx(last - first)
    assert problem.beside(start)(start) == 0


@pytest.fixture(params=[2**24, 2 * IN, 1], ids=["whole", "two outputs", "one output"])
def part(request, monkeypatch) -> None:
    """How many numbers of a weight are worked on at a time."""
    monkeypatch.setattr("mergekit_dam.least_squares.objective.PART", request.param)


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_solution_is_that_of_the_normal_equations(part, granularity, axis, bias, base):
    shape = (OUT, IN) if axis == -1 else (IN, OUT)
    layer = {"w": tensors(*shape, base=base)} | ({"b": tensors(OUT, base=base)} if bias else {})

    def loss(weights: Coefficients) -> torch.Tensor:
        w = weights["w"] if axis == -1 else weights["w"].T
        made = [x @ w.T + weights.get("b", 0) for x, _ in tokens()]
        errors = zip(made, tokens(), strict=True)
        return sum((y - wanted).square().sum() for y, (_, wanted) in errors) / 2 / TOKENS

    start = starts(layer, granularity, axis)
    require_the_dense_solution(linear(axis, bias), loss, layer, start)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_embeddings_have_theirs_too(part, granularity):
    layer, objective = {"w": tensors(6, IN)}, EmbeddingObjective("w")
    generator, counts = torch.Generator().manual_seed(0), []
    for source in layer["w"].sources:
        counts.append(torch.randint(0, 4, (6,), generator=generator))
        counts[-1][2] = 0  # a token that never comes
        objective.add(counts[-1] // 2, source, 0.1)  # rows come in several calls
        objective.add(counts[-1] - counts[-1] // 2, source, 0.1)

    def loss(weights: Coefficients) -> torch.Tensor:
        wanted = zip(counts, layer["w"].sources, strict=True)
        return sum((n[:, None] * (weights["w"] - y).square()).sum() / 20 for n, y in wanted)

    start = starts(layer, granularity)
    if granularity in ("column", "tensor"):
        require_the_dense_solution(objective, loss, layer, start)
        return
    found = solve(Problem(objective, layer, torch.float64), start, 0.01)["w"]
    assert (found[:, 2] == start["w"][:, 2]).all() and (found != start["w"]).any()


def test_norms_have_theirs_too():
    layer, objective = {"w": tensors(IN), "b": tensors(IN, seed=3)}, NormObjective("w", "b")
    rows = [(random(30, IN, seed=source), random(30, IN, seed=source + 4)) for source in range(N)]
    for x, y in rows:
        objective.add(x, y, 0.1)

    def loss(weights: Coefficients) -> torch.Tensor:
        return sum((x * weights["w"] + weights["b"] - y).square().sum() / 20 for x, y in rows)

    require_the_dense_solution(objective, loss, layer, starts(layer, "column"))


@pytest.mark.parametrize("granularity", ["column", "row", "tensor"])
def test_known_coefficients_are_recovered(part, granularity):
    layer = {"w": tensors(OUT, IN)}
    start = starts(layer, granularity)
    known = {"w": random(*start["w"].shape, seed=7)}
    weight = combine(known["w"], layer["w"].sources)
    objective, inputs = LinearObjective("w", None), random(60, IN)
    objective.add(inputs, inputs @ weight.T, 1 / 60)
    problem = Problem(objective, layer, torch.float64)
    found = solve(problem, start, 0.0, iterations=500, tolerance=1e-10)
    torch.testing.assert_close(found["w"], known["w"], rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    granularity=st.sampled_from(GRANULARITIES),
    tokens=st.integers(1, 6),  # fewer than columns too
    dead=st.booleans(),
    identical=st.booleans(),
    ridge=st.sampled_from([0.0, 1e-3, 1.0]),
    iterations=st.integers(1, 30),
    seed=st.integers(0, 1000),
)
@example("row", 1, True, True, 0.0, 1, 57)  # singular, and by rounding not even semidefinite
def test_never_worse_than_the_start_and_always_finite(
    granularity, tokens, dead, identical, ridge, iterations, seed
):
    layer = {"w": tensors(OUT, IN, seed=seed)}
    if identical:
        same = layer["w"].sources[0]
        layer["w"] = Inputs((same, same, random(OUT, IN)), None, None)
    objective, inputs = LinearObjective("w", None), random(tokens, IN, seed=seed).float()
    if dead:
        inputs[:, 1] = 0
    objective.add(inputs, random(tokens, OUT, seed=seed + 1).float(), 1 / tokens)
    problem, start = Problem(objective, layer), starts(layer, granularity)
    start = {name: c.float() for name, c in start.items()}
    found = solve(problem, start, ridge, iterations=iterations)
    assert torch.isfinite(found["w"]).all()
    assert problem.beside(start)(found) <= 1e-6
    if identical:  # two sources that are one share what they get
        torch.testing.assert_close(found["w"][0], found["w"][1], rtol=1e-3, atol=1e-3)
    if dead and granularity == "column":
        assert (found["w"][:, :, 1] == start["w"][:, :, 1]).all()


# On whole models


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    return tiny.save_models(tmp_path_factory.mktemp("models"), tiny.CONFIGS["llama"], 3)


def solved(path: Path):
    prepared = prepare(read_recipe(str(path)), QUIET, device="cpu")
    least_squares(prepared.merged, [source.train for source in prepared.data])
    return prepared


def mean_kl(prepared) -> float:
    figures = evaluate(prepared.merged, [source.held_out for source in prepared.data], 512, 256)
    return sum(f.kl for f in figures) / len(figures)


SOLVED = {  # names of what has no solution of its own, or none of ours
    "llama": (),
    "llama_tied": (),
    "qwen2": (),
    "gemma2": (),
    "gemma3": (),
    "gpt2": (),
    "mixtral": (".experts.", ".mlp.gate."),
}


@pytest.mark.parametrize("name", SOLVED)
def test_every_layer_of_every_architecture_is_found_and_the_merge_comes_nearer(
    recipe, tmp_path, name
):
    models = tiny.save_models(tmp_path, tiny.CONFIGS[name], 2)
    prepared = prepare(read_recipe(str(recipe(models))), QUIET, device="cpu")
    blocks = [m for m in prepared.merged.model.modules() if isinstance(m, Block)]
    trained = prepared.merged.trained_coefficients()
    found = {t for block in blocks for layer in layers(block, trained) for t in layer.tensors}
    rest = {t for t in trained if any(part in t for part in SOLVED[name])}
    assert found | rest == trained.keys() and not found & rest
    before, start = mean_kl(prepared), {n: c.clone() for n, c in trained.items()}
    least_squares(prepared.merged, [source.train for source in prepared.data])
    assert mean_kl(prepared) < before
    changed = {n for n, c in trained.items() if not torch.equal(c, start[n])}
    assert changed <= found and len(changed) > len(found) / 2


def test_a_source_that_is_alone_keeps_its_coefficients_at_one(recipe, models):
    """Its own layers reach its own outputs already."""
    prepared = solved(recipe(models[:1]))
    for name, c in prepared.merged.coefficients().items():
        torch.testing.assert_close(c, torch.ones_like(c), rtol=0, atol=1e-3, msg=name)


def test_padding_counts_for_nothing(recipe, models):
    """Rows of one source that are solved in one chunk or each alone give the same."""
    results = []
    for chunk in (4096, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mergekit_dam.least_squares.rows.CHUNK", chunk)
            results.append(solved(recipe(models)).merged.coefficients())
    for name, c in results[0].items():
        torch.testing.assert_close(c, results[1][name], rtol=0.02, atol=0.01, msg=name)


@pytest.mark.parametrize("formula", ["weights", "task_vectors"])
def test_steps_0_is_a_merge_without_gradients(recipe, models, formula, tmp_path):
    dam = {"start": "least_squares", "steps": 0, "formula": formula}
    path = recipe(models[1:], base_model=str(models[0]), dam=dam)
    header = fit(read_recipe(str(path)), str(tmp_path / "a.safetensors"), QUIET, device="cpu")
    again = fit(read_recipe(str(path)), str(tmp_path / "b.safetensors"), QUIET, device="cpu")
    results = header.results
    assert sum(f.kl for f in results.fit) < sum(f.kl for f in results.average)
    assert again == header
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


class Killed(BaseException):
    pass


def test_a_start_that_was_killed_goes_on_after_the_last_whole_block(recipe, models, tmp_path):
    recipe_ = read_recipe(str(recipe(models, dam={"start": "least_squares", "steps": 0})))
    whole = prepare(recipe_, QUIET, device="cpu")
    folder = tmp_path / "fit"
    folder.mkdir()
    _calibrate(whole, folder, resume=False)

    half, reports = prepare(recipe_, QUIET, device="cpu"), []

    def kill():
        reports.append(None)
        if len(reports) == 3:
            raise Killed

    (folder / PROGRESS).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mergekit_dam.fit.calibration.tqdm", lambda **_: _Bar(kill))
        with pytest.raises(Killed):
            _calibrate(half, folder, resume=False)
    kept = (folder / PROGRESS).read_bytes()

    rest = prepare(recipe_, QUIET, device="cpu")
    _calibrate(rest, folder, resume=True)
    assert len(kept) < len((folder / PROGRESS).read_bytes())
    for name, c in whole.merged.coefficients().items():
        assert torch.equal(c, rest.merged.coefficients()[name]), name


def _calibrate(fit: Fit, folder: Path, *, resume: bool) -> None:
    figures = functools.partial(evaluate, fit.merged, tokens=500, at_head=500)
    calibrate(fit.merged, fit.data, fit.settings, folder, figures, resume=resume, quiet=True)


class _Bar:
    """Stands in for the progress bar, to end a start between two blocks."""

    def __init__(self, kill):
        self._kill = kill

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def update(self):
        self._kill()


def test_a_fit_may_start_where_another_has_ended(recipe, models, tmp_path):
    first = tmp_path / "first.safetensors"
    fit(read_recipe(str(recipe(models))), str(first), QUIET, device="cpu")
    path = recipe(models, dam={"start": str(first), "steps": 0})
    fit(read_recipe(str(path)), str(tmp_path / "second.safetensors"), QUIET, device="cpu")
    one, other = CoefficientFile(first), CoefficientFile(tmp_path / "second.safetensors")
    for name in one.names:
        assert torch.equal(one.get(name), other.get(name)), name
    assert "fitted for other sources" in refusal(
        "mergekit-dam", "check", recipe(models[:2], dam={"start": str(first)})
    )


def test_the_default_is_the_yamls_weights_or_least_squares(recipe, models, tmp_path):
    def start_of(path: Path) -> str:
        return prepare(read_recipe(str(path)), QUIET, device="cpu").settings.start

    def weighted(path: Path) -> Path:
        text = path.read_text().replace(
            f"- model: {models[0]}\n", f"- model: {models[0]}\n  parameters: {{weight: 1}}\n"
        )
        text = text.replace(
            f"- model: {models[1]}\n", f"- model: {models[1]}\n  parameters: {{weight: 3}}\n"
        )
        path.write_text(text)
        return path

    assert start_of(recipe(models[:2], dam={"start": None, "steps": 0})) == "least_squares"
    assert start_of(recipe(models[:2], dam={"start": None})) == "least_squares"
    assert start_of(weighted(recipe(models[:2], dam={"start": None}))) == "weights"
    assert start_of(recipe(models[:2], dam={"start": "average"})) == "average"


def test_a_start_that_is_none_is_refused(recipe, models):
    message = refusal("mergekit-dam", "check", recipe(models, dam={"start": "least_square"}))
    assert "`dam.start` is least_square, which is no file" in message
    assert "least_squares" in message


def test_the_command_line_solves_and_fits(recipe, models):
    path = recipe(models, dam={"start": "least_squares", "steps": 2})
    done = run("mergekit-dam", "fit", path)
    assert "KL fit" in done.stdout and "Solving" in done.stderr
