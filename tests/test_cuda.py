"""Fits on a GPU against those on a CPU. Skipped where there is none."""

import copy
from pathlib import Path
from typing import get_args

import pytest
import tiny
import torch
import transformers
from architectures import FITTED
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.compare import ground
from mergekit_dam.config import read_recipe
from mergekit_dam.config.settings import Objective
from mergekit_dam.data import Row, SourceData
from mergekit_dam.fit import fit
from mergekit_dam.fit.batches import batch
from mergekit_dam.fit.objective import Distillation
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.fit.rows import load_data
from mergekit_dam.formula import combine
from mergekit_dam.model import Recompute, offload
from mergekit_dam.plan import plan_merge

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device, and MERGEKIT_DAM_GPU=1"
)
CLOSE = {"compute_dtype": "float32"}
# A head inside another model, experts, keys and values that layers share, convolutions, states.
UNLIKE = [
    "OPTForCausalLM", "MixtralForCausalLM", "Gemma3nForCausalLM", "Lfm2ForCausalLM",
    "MambaForCausalLM",
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tiny.save_models(tmp_path_factory.mktemp("models"), tiny.CONFIGS["llama"], 3)


def fitted(path: Path, out: Path, device: str) -> CoefficientFile:
    fit(read_recipe(str(path)), str(out), MergeOptions(quiet=True), device=device)
    return CoefficientFile(out)


def close(one: CoefficientFile, two: CoefficientFile, **tolerance: float) -> None:
    for name in one.names:
        torch.testing.assert_close(one.get(name), two.get(name), **tolerance)


@pytest.mark.parametrize("start", ["average", "least_squares"])
def test_the_fit_is_that_of_a_cpu(recipe, models, tmp_path, start) -> None:
    path = recipe(models[:2], base_model=str(models[2]), dam={**CLOSE, "start": start})
    files = [fitted(path, tmp_path / device, device) for device in ("cpu", "cuda")]
    close(*files, atol=2e-3, rtol=1e-2)


def test_one_source_is_fitted_as_on_a_cpu(recipe, models, tmp_path) -> None:
    dam = {**CLOSE, "formula": "task_vectors", "start": "average"}
    path = recipe(models[:1], base_model=str(models[2]), dam=dam)
    files = [fitted(path, tmp_path / device, device) for device in ("cpu", "cuda")]
    close(*files, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("name", UNLIKE)
def test_passes_of_other_kinds_are_those_of_a_cpu(recipe, tmp_path, name) -> None:
    """In all three ways to recompute, none of which leaves anything behind."""
    (architecture,) = (one for one in FITTED if one.name == name)
    own = [architecture.save(tmp_path / f"m{seed}", seed) for seed in range(2)]
    settings = read_recipe(str(recipe(own, dam=CLOSE)))
    found = {}
    for device, mode in (("cpu", "block"), *(("cuda", mode) for mode in get_args(Recompute))):
        merged = prepare(settings, MergeOptions(quiet=True), device=device).merged
        merged.recompute, step, held = mode, Distillation(merged, Objective()), []
        rows = [Row([(7 * n + place) % 36 + 4 for place in range(9 + n)]) for n in range(2)]
        inputs = {key: value.to(merged.device) for key, value in batch(rows, [0, 1]).items()}
        for _ in range(3):
            step.zero_grad()
            step(**inputs)["loss"].backward()
            held.append(torch.cuda.memory_allocated())
        assert held[1] == held[2]
        found[device, mode] = [c.grad.cpu() for c in merged.trained_coefficients().values()]
    expected = found.pop(("cpu", "block"))
    for gradients in found.values():
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("granularity", ["column", "row"])
def test_large_tables_are_fitted_as_on_a_cpu(recipe, tmp_path, granularity) -> None:
    """By rows that are looked up, or made whole with gradients of rows; twice the same bits."""
    config = copy.deepcopy(tiny.CONFIGS["llama"])
    config.vocab_size = 4096
    models = tiny.save_models(tmp_path, config, 2)
    path = recipe(models, dam={**CLOSE, "granularity": granularity})
    devices = ("cpu", "cuda", "cuda")
    files = [fitted(path, tmp_path / str(n), device) for n, device in enumerate(devices)]
    close(*files[:2], atol=2e-3, rtol=1e-2)
    close(*files[1:], atol=0, rtol=0)


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-4), ("bfloat16", 5e-2)])
def test_sources_teach_together_as_they_do_alone(recipe, models, offload, dtype, rtol) -> None:
    path = recipe(models, dtype=dtype, dam={"compute_dtype": dtype, "offload": offload})
    merged = prepare(read_recipe(str(path)), MergeOptions(quiet=True), device="cuda").merged
    rows = [Row([(7 * n + place) % 36 + 4 for place in range(9 + n // 4)]) for n in range(6)]
    step = {key: value.cuda() for key, value in batch(rows, [0, 1, 2, 0, 1, 2]).items()}
    assert merged.mixes()
    together = Distillation(merged, Objective())(**step)
    merged._mixer.works = False
    for name, value in Distillation(merged, Objective())(**step).items():
        torch.testing.assert_close(together[name], value, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_the_sources_live_changes_no_bit(recipe, models, tmp_path, where, dtype) -> None:
    files = [
        fitted(recipe(models[:2], dtype=dtype, dam={"offload": place}), tmp_path / place, "cuda")
        for place in ("none", where)
    ]
    close(*files, atol=0, rtol=0)


@pytest.mark.parametrize("recompute", ["block", "weights", "none"])
def test_long_rows_have_the_same_bits_each_time(recipe, tmp_path, recompute) -> None:
    """Of which attention adds up the gradients from many sides."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 2048}
    config = transformers.LlamaConfig(**{**tiny.SIZES, **sizes})
    large = tiny.save_models(tmp_path, config, 2, torch.bfloat16)
    places = torch.arange(1500)
    rows = [Row(((7 + number) * places % 36 + 4).tolist()) for number in range(2)]
    data = [SourceData([row], [row]) for row in rows]
    inputs = {key: value.cuda() for key, value in batch(rows, [0, 1]).items()}
    found = []
    for place in ("none", "none", "none", "cpu", "disk"):
        dam = {"batch_size": 1, "max_length": 1500, "recompute": recompute, "offload": place}
        path = read_recipe(str(recipe(large, dtype="bfloat16", dam=dam)))
        merged = prepare(path, MergeOptions(quiet=True), device="cuda", data=data).merged
        Distillation(merged, Objective())(**inputs)["loss"].backward()
        found.append({name: c.grad for name, c in merged.trained_coefficients().items()})
    for other in found[1:]:
        for name, gradient in found[0].items():
            assert torch.equal(gradient, other[name]), name


@pytest.mark.parametrize("held", [0.5, 0])
def test_a_comparison_measures_what_it_does_on_a_cpu(recipe, models, monkeypatch, held) -> None:
    """With weights on the GPU as a whole, and a block at a time."""
    monkeypatch.setattr(ground, "HELD", held)
    path = recipe(models[:2], base_model=str(models[2]), dam=CLOSE)
    found = read_recipe(str(path))
    plan = plan_merge(found.merge, MergeOptions(quiet=True), "weights")
    data = load_data(found, plan, "none", "cpu")
    tensors = load_file(models[2] / "model.safetensors")
    scores = []
    for device in ("cpu", "cuda"):
        own = ground.Ground(found, plan, data, [[], []], device=device, search_rows=4)
        students = own.source(1), own.base(), own.merge(tensors)
        scores.append([s.model_dump() for student in students for s in own.score(student)])
    for one, other in zip(*scores, strict=True):
        assert one.pop("exact") is other.pop("exact") is None
        assert one == pytest.approx(other, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("sparsify", ["dare_ties", "della"])
def test_random_masks_are_those_of_a_cpu(recipe, models, tmp_path, sparsify) -> None:
    """At the start the merge is made of the masks alone."""
    dam = {**CLOSE, "formula": "task_vectors", "sparsify": sparsify, "steps": 0}
    path = recipe(
        models[:2],
        base_model=str(models[2]),
        parameters={"coefficients": str(tmp_path / "dam.safetensors"), "density": 0.5},
        dam=dam,
    )
    figures = [
        fitted(path, tmp_path / device, device).header.results.fit for device in ("cpu", "cuda")
    ]
    for one, two in zip(*figures, strict=True):
        assert one.kl == pytest.approx(two.kl, rel=1e-3)


def test_copies_that_come_late_are_waited_for(recipe, models, tmp_path, monkeypatch) -> None:
    class Late(offload._Copy):
        def __init__(self, chosen, device, stream):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)
            super().__init__(chosen, device, stream)

    first = fitted(recipe(models[:2], dam={"offload": "none"}), tmp_path / "none", "cuda")
    monkeypatch.setattr(offload, "_Copy", Late)
    second = fitted(recipe(models[:2], dam={"offload": "cpu"}), tmp_path / "cpu", "cuda")
    close(first, second, atol=0, rtol=0)


@pytest.mark.parametrize("dam", [{"recompute": "weights"}, {"recompute": "none"}])
def test_what_is_made_again_changes_no_bit(recipe, models, tmp_path, dam) -> None:
    files = [
        fitted(recipe(models[:2], dam=own), tmp_path / name, "cuda")
        for name, own in (("block", {"recompute": "block"}), ("other", dam))
    ]
    close(*files, atol=0, rtol=0)


def test_kept_teachers(recipe, models, tmp_path) -> None:
    files = [
        fitted(recipe(models[:2], dam={**CLOSE, "teacher": teacher}), tmp_path / teacher, "cuda")
        for teacher in ("live", "cached")
    ]
    close(*files, atol=2e-3, rtol=1e-2)


def test_float16_sources(recipe, models, tmp_path) -> None:
    """Computed in bfloat16."""
    path = recipe(models[:2], dtype="float16", dam={"steps": 20})
    results = fitted(path, tmp_path / "out", "cuda").header.results
    assert sum(f.kl for f in results.fit) < sum(f.kl for f in results.average)


@pytest.mark.parametrize("mode", ["block", "weights", "none"])
def test_a_step_takes_what_was_predicted(recipe, tmp_path, mode) -> None:
    sizes = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1376}
    config = transformers.LlamaConfig(**{**tiny.SIZES, **sizes, "num_hidden_layers": 6})
    large = tiny.save_models(tmp_path, config, 2, torch.bfloat16)
    rows = [Row([number + 1] * 512) for number in range(2)]
    data = [SourceData([row], [row]) for row in rows]
    path = recipe(large, dtype="bfloat16", dam={"batch_size": 1, "recompute": mode})
    found = prepare(read_recipe(str(path)), MergeOptions(quiet=True), device="cuda", data=data)
    step = Distillation(found.merged, found.settings.objective)
    inputs = {key: value.cuda() for key, value in batch(rows, [0, 1]).items()}
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(**inputs)["loss"].backward()
        step.zero_grad()
        taken = torch.cuda.max_memory_allocated() - before
    assert found.needs.of(mode) == pytest.approx(taken, rel=0.15)


def test_a_tensor_of_more_than_two_billion_numbers() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 20 * 2**30:
        pytest.skip("needs 20 GB")
    source = torch.ones(2**20, 2**11 + 8, dtype=torch.bfloat16, device="cuda")
    source[-1] = 3
    c = torch.full((1, 1, source.shape[1]), 2.0, device="cuda", requires_grad=True)
    merged = combine(c, [source])
    assert merged[0].eq(2).all() and merged[-1].eq(6).all()
    merged[-2:].sum().backward()
    assert c.grad.eq(4).all()
