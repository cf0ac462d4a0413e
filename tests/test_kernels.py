"""The kernels against the plain path, which is tested against three lines of plain torch: on a GPU
compiled, elsewhere by Triton's interpreter."""

import importlib
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_dam import formula
from mergekit_dam.formula import FORMULAS, GRANULARITIES, coefficient_shape, combine, combine_all
from mergekit_dam.inputs import Inputs

pytest.importorskip("triton", reason="needs Triton, which is there for Linux")
IS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if IS_CUDA else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# name -> (S, what coefficient_shape is told)
LAYOUTS = {
    "linear": ((67, 300), {}),
    "tall": ((1030, 3), {}),
    "one number": ((1, 1), {}),
    "embedding": ((1201, 17), {}),
    "conv1d": ((67, 300), {"input_axis": -2}),
    "norm": ((1025,), {}),
    "bias": ((77,), {"bias": True}),
    "experts": ((3, 19, 270), {}),
    "convolution": ((5, 3, 2, 7), {}),
}


@pytest.fixture(scope="module")
def kernels():
    return importlib.import_module("mergekit_dam.kernels")


def both(
    kernels,
    patch,
    shape,
    broadcast,
    name,
    dtype,
    out=None,
    is_strided=False,
    prepared=False,
    count=3,
):
    """Merged weight and gradient of the coefficients: by plain torch, and by the kernels."""
    generator = torch.Generator().manual_seed(5)

    def numbers(*size):
        drawn = torch.randn(size, generator=generator)
        return drawn.movedim(0, -1).contiguous().movedim(-1, 0) if is_strided else drawn

    sources = [numbers(*shape).to(DEVICE, dtype) for _ in range(count)]
    base = numbers(*shape).to(DEVICE, dtype) if name == "task_vectors" else None
    outer = numbers(*shape).to(DEVICE, out or dtype)
    results = []
    for found in (None, kernels):
        c = torch.randn((count, *broadcast), generator=torch.Generator().manual_seed(6))
        c = c.to(DEVICE).requires_grad_()
        patch.setattr(formula, "_kernels", lambda device, found=found: found)
        merged = combine(c, sources, base, out, prepared=prepared)
        merged.backward(outer)
        results.append((merged.detach(), c.grad))
    return results


def assert_like(plain, fused, shape) -> None:
    """To a rounding of the result, and of float32 sums over a tensor in another order."""
    assert plain[0].dtype == fused[0].dtype
    assert plain[1].dtype == fused[1].dtype == torch.float32
    step = torch.finfo(plain[0].dtype).eps
    torch.testing.assert_close(fused[0], plain[0], rtol=step, atol=1e-5 if step < 1e-4 else step)
    noise = 1e-6 * math.sqrt(math.prod(shape))
    torch.testing.assert_close(fused[1], plain[1], rtol=1e-4, atol=max(noise, 1e-5))


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_granularity(kernels, monkeypatch, layout, granularity, name) -> None:
    shape, options = LAYOUTS[layout]
    broadcast = coefficient_shape(shape, granularity, **options)
    results = both(kernels, monkeypatch, shape, broadcast, name, torch.float32)
    assert_like(*results, shape)


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(kernels, monkeypatch, dtype, out) -> None:
    results = both(kernels, monkeypatch, (67, 300), (1, 300), "task_vectors", dtype, out)
    assert_like(*results, (67, 300))


@pytest.mark.parametrize("broadcast", [(1, 300), (67, 1), (1, 1), (67, 300), (300,)])
@pytest.mark.parametrize("prepared", [False, True])
def test_inputs_that_are_not_contiguous(kernels, monkeypatch, broadcast, prepared) -> None:
    settings = {"is_strided": True, "prepared": prepared}
    results = both(
        kernels, monkeypatch, (67, 300), broadcast, "task_vectors", torch.float32, **settings
    )
    assert_like(*results, (67, 300))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    kept=st.lists(st.booleans(), min_size=4, max_size=4),
    name=st.sampled_from(FORMULAS),
)
def test_every_broadcast(kernels, shape, kept, name) -> None:
    broadcast = [size if keep else 1 for size, keep in zip(shape, kept, strict=False)]
    with pytest.MonkeyPatch.context() as patch:
        results = both(kernels, patch, shape, broadcast, name, torch.float32)
    assert_like(*results, shape)


def test_the_same_bits_at_each_call(kernels, monkeypatch) -> None:
    first, second = (
        both(kernels, monkeypatch, (130, 300), (1, 300), "weights", torch.bfloat16)[1]
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_several_tensors_at_once(kernels, monkeypatch, count) -> None:
    """More than a table has rows of one kind, and of kinds that go apart."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(n, 64) for n in range(1, 11)] + [(33, 65), (64,), (3, 17, 32), (0, 4), (2, 32)]
    dtypes = [torch.float32] * 12 + [torch.bfloat16] * 3
    coefficients, inputs, outers = [], [], []
    for number, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
        granularity = GRANULARITIES[number % len(GRANULARITIES)]
        drawn = torch.randn((count + 2, *shape), generator=generator).to(DEVICE, dtype)
        base, outer, *sources = drawn
        sources, has_base = tuple(sources), number % 3
        inputs.append(
            Inputs(sources, base if has_base else None, sources if has_base == 2 else None)
        )
        outers.append(outer)
        factors = (count, *coefficient_shape(shape, granularity))
        coefficients.append(torch.randn(factors, generator=generator).to(DEVICE))
    found = []
    for chosen in (None, kernels):
        monkeypatch.setattr(formula, "_kernels", lambda device, chosen=chosen: chosen)
        leaves = [c.clone().requires_grad_() for c in coefficients]
        made = combine_all(leaves, inputs, dtypes)
        torch.autograd.backward(made, outers)
        found.append([(m.detach(), c.grad) for m, c in zip(made, leaves, strict=True)])
    for plain, fused, shape in zip(*found, shapes, strict=True):
        assert_like(plain, fused, shape)


def test_they_are_tried_before_they_are_used(kernels) -> None:
    kernels._works.cache_clear()
    assert kernels.works(DEVICE)


def test_they_are_tried_where_another_device_is_the_default(kernels) -> None:
    """As in the threads of mergekit's `--multi-gpu`."""
    kernels._works.cache_clear()
    with torch.device("meta"):
        assert kernels.works(DEVICE)


def test_an_empty_tensor(kernels) -> None:
    empty = torch.empty(0, 4, device=DEVICE)
    c = torch.ones(2, 1, 4, device=DEVICE)
    inputs = Inputs((empty, empty), None, None)
    (merged,) = kernels.combine([c], [inputs], [torch.float32])
    assert merged.shape == (0, 4)
    assert not kernels.gradient([empty], [inputs], [c.shape])[0].any()


@pytest.mark.parametrize("count", [1, 2, 8, 9, 17])
def test_any_number_of_sources(kernels, monkeypatch, count) -> None:
    results = both(
        kernels, monkeypatch, (33, 40), (1, 40), "task_vectors", torch.float32, count=count
    )
    assert_like(*results, (33, 40))


@pytest.mark.parametrize("fault", ["raises", "is wrong"])
def test_what_does_not_work_is_said_and_not_used(kernels, monkeypatch, caplog, fault) -> None:
    def broken(*args, **kwargs):
        if fault == "raises":
            raise RuntimeError("no C compiler\nand more")
        return [torch.zeros(3, 1, 1, device=DEVICE)] * 3

    monkeypatch.setattr(kernels, "gradient", broken)
    kernels._works.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not kernels.works(DEVICE)
    kernels._works.cache_clear()
    assert ("no C compiler" if fault == "raises" else "something else") in caplog.text
    assert "and more" not in caplog.text


def test_plain_torch_serves_where_there_is_no_gpu() -> None:
    assert formula._kernels(torch.device("cpu")) is None


def test_they_compile_and_load_16_bytes_at_once() -> None:
    """For GPUs of the Ampere, Ada and Hopper generations, none of which need be here."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", str(Path(__file__).with_name("compiled.py"))]
    done = subprocess.run(
        [*command, "80", "89", "90"], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert all("ld.global.v4" in own["loads"] for own in found), found
    told = [own for own in found if own["spilled"] is not None]  # the assembler may be an old one
    assert {own["capability"] for own in told} >= {"80", "89"}
    assert not [own for own in told if own["spilled"]]


@pytest.mark.skipif(not IS_CUDA, reason="needs a CUDA device, and MERGEKIT_DAM_GPU=1")
def test_on_a_gpu_no_float32_copy_is_made(kernels) -> None:
    sources = [torch.randn(4096, 4096, dtype=torch.bfloat16, device=DEVICE) for _ in range(3)]
    c = torch.full((3, 1, 4096), 1 / 3, device=DEVICE, requires_grad=True)
    combine(c, sources).sum().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    combine(c, sources)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= 1.1 * sources[0].nbytes
