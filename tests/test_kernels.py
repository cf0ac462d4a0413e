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
from mergekit_dam.inputs import Inputs, Together

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
    c = torch.randn((count, *broadcast), generator=torch.Generator().manual_seed(6)).to(DEVICE)
    inputs = Inputs(tuple(sources), base, tuple(sources) if prepared else None)
    plain, fused = by_each(kernels, patch, ([c], [inputs], [outer]), out or dtype)
    return plain[0], fused[0]


Tensors = tuple[list[torch.Tensor], list[Inputs], list[torch.Tensor]]


def by_each(kernels, patch, tensors: Tensors, written, stored=None) -> list[list[tuple]]:
    """Merged weights and gradients of the coefficients, by plain torch and by the kernels, of
    coefficients, inputs and weights' gradients."""
    coefficients, inputs, outers = tensors
    dtypes, found = [written] * len(inputs), []
    for chosen in (None, kernels):
        patch.setattr(formula, "_kernels", lambda device, chosen=chosen: chosen)
        leaves = [c.clone().requires_grad_() for c in coefficients]
        made = combine_all(leaves, inputs, dtypes, stored=stored)
        torch.autograd.backward(made, outers)
        found.append([(m.detach(), c.grad) for m, c in zip(made, leaves, strict=True)])
    return found


def assert_like(plain, fused, shape, written=torch.float64) -> None:
    """To a rounding of the result, and of float32 sums over a tensor in another order."""
    assert plain[0].dtype == fused[0].dtype
    assert plain[1].dtype == fused[1].dtype == torch.float32
    step = max(torch.finfo(dtype).eps for dtype in (plain[0].dtype, written))
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
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4).filter(
        lambda shape: math.prod(shape) <= 2**16  # an interpreter of kernels takes its time
    ),
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


def drawn(shapes, granularity: str, dtypes, base: str, axis: int, seed: int) -> Tensors:
    """Coefficients, inputs and weights' gradients of several tensors; `dtypes` of each source."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    coefficients, inputs = [], []
    for shape in shapes:
        factors = coefficient_shape(shape, granularity, input_axis=axis)
        coefficients.append(numbers((len(dtypes), *factors)))
        sources = tuple(numbers(shape, dtype) for dtype in dtypes)
        origin = numbers(shape, dtypes[-1]) if base else None
        inputs.append(Inputs(sources, origin, sources if base == "prepared" else None))
    return coefficients, inputs, [numbers(shape) for shape in shapes]


def by_both(kernels, patch, tensors: Tensors, written, stored) -> None:
    """Several tensors by plain torch and by the kernels are alike."""
    outers = [outer.to(stored or written) for outer in tensors[2]]
    found = by_each(kernels, patch, (*tensors[:2], outers), written, stored)
    for plain, fused, outer in zip(*found, outers, strict=True):
        # By one rounding: the interpreter cuts numbers off where it makes bfloat16 of them.
        assert_like(plain, fused, outer.shape, written)
        assert torch.equal(fused[0], fused[0].to(written).to(fused[0].dtype))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_several_tensors_at_once(kernels, data) -> None:
    """Of many heights, one of them empty perhaps, whose gradients are summed in any division."""
    draw = data.draw
    width = draw(st.sampled_from([1, 16, 33, 64, 600]))
    heights = draw(st.lists(st.sampled_from([0, 1, 7, 40]), min_size=1, max_size=12))
    shapes = [draw(st.sampled_from([(h, width), (h, width), (2, h, 32)])) for h in heights]
    narrow = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
    dtypes = draw(st.lists(narrow, min_size=1, max_size=6))
    written, stored = draw(narrow), draw(st.sampled_from([None, torch.float32, torch.bfloat16]))
    base, axis = draw(st.sampled_from(["", "base", "prepared"])), draw(st.sampled_from([-1, -2]))
    tensors = drawn(shapes, draw(st.sampled_from(GRANULARITIES)), dtypes, base, axis, len(shapes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "PROGRAMS", draw(st.sampled_from([1, 5, 1024])))
        patch.setattr(kernels, "STEPS", draw(st.sampled_from([1, 3, 32])))
        by_both(kernels, patch, tensors, written, stored)


@pytest.mark.parametrize("granularity", ["column", "row"])
def test_tensors_of_different_heights_go_together(kernels, monkeypatch, granularity) -> None:
    """More of them than the smallest table holds, and programs that sum up several tiles."""
    started = starts(kernels, monkeypatch)
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    shapes = [(16 * n, 512) for n in range(1, 12)]
    tensors = drawn(shapes, granularity, [torch.bfloat16] * 3, "", -1, 3)
    by_both(kernels, monkeypatch, tensors, torch.bfloat16, None)
    assert started == [11, 11]


@pytest.mark.parametrize("height", [64, 256])
def test_norms_go_with_matrices_beside_which_they_are_small(kernels, monkeypatch, height) -> None:
    started = starts(kernels, monkeypatch)
    shapes = [(512,), (height, 512), (512,), (16, 512)]
    tensors = drawn(shapes, "column", [torch.bfloat16] * 3, "base", -1, 3)
    by_both(kernels, monkeypatch, tensors, torch.bfloat16, None)
    assert started == ([4, 4] if height == 256 else [2, 2, 2, 2])


def starts(kernels, patch) -> list[int]:
    """How many tensors each start of a kernel is for."""
    found, table = [], kernels.Launch.table

    def counting(launch, results, *others):
        found.append(len(results))
        return table(launch, results, *others)

    patch.setattr(kernels.Launch, "table", counting)
    return found


@pytest.mark.parametrize("base", ["base", "prepared"])
def test_sources_of_several_dtypes_are_not_copied(kernels, monkeypatch, base) -> None:
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.bfloat16]
    tensors = drawn([(33, 64), (5, 64)], "column", dtypes, base, -1, 4)
    by_both(kernels, monkeypatch, tensors, torch.bfloat16, torch.float32)
    for is_sum in (False, True):
        assert not kernels.placed(tensors[1], is_sum=is_sum).is_copied


def test_what_is_found_out_is_kept_with_inputs_that_stay(kernels, monkeypatch) -> None:
    """And what had to be copied is not, nor is it taken for what other coefficients need."""
    tensors = drawn([(33, 64), (5, 64)], "column", [torch.float32] * 2, "base", -1, 4)
    together = Together(tensors[1])
    for granularity in ("column", "row", "column"):
        other = drawn([(33, 64), (5, 64)], granularity, [torch.float32] * 2, "base", -1, 5)
        by_both(kernels, monkeypatch, (other[0], together, other[2]), torch.bfloat16, None)
    assert together.known.keys() == {False, True}
    strided = Together([Inputs(tuple(torch.randn(2, 7, 5, device=DEVICE).mT), None, None)])
    kernels.combine([torch.ones(2, 1, 7, device=DEVICE)], strided, *[[torch.float32]] * 2)
    assert not strided.known


def test_they_are_tried_before_they_are_used(kernels) -> None:
    kernels._works.cache_clear()
    assert kernels.works(DEVICE)


def test_they_are_tried_where_another_device_is_the_default(kernels) -> None:
    """As in the threads of mergekit's `--multi-gpu`."""
    kernels._works.cache_clear()
    with torch.device("meta"):
        assert kernels.works(DEVICE)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)])
def test_an_empty_tensor(kernels, shape, granularity) -> None:
    empty = torch.empty(shape, device=DEVICE)
    c = torch.ones(2, *coefficient_shape(shape, granularity), device=DEVICE)
    inputs = Inputs((empty, empty), None, None)
    (merged,) = kernels.combine([c], [inputs], [torch.float32], [torch.float32])
    assert merged.shape == shape
    (by_c,) = kernels.gradient([empty], [inputs], [c.shape])
    assert by_c.shape == c.shape
    assert not by_c.any()


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
