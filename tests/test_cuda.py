"""Fits on a GPU against those on a CPU. Skipped where there is none."""

from pathlib import Path

import pytest
import tiny
import torch
from mergekit.options import MergeOptions

from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.config import read_recipe
from mergekit_dam.fit import fit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CLOSE = {"compute_dtype": "float32"}


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


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_the_sources_live_changes_no_bit(recipe, models, tmp_path, offload, dtype) -> None:
    files = [
        fitted(recipe(models[:2], dtype=dtype, dam={"offload": place}), tmp_path / place, "cuda")
        for place in ("none", offload)
    ]
    close(*files, atol=0, rtol=0)


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
