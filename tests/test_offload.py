"""Where the sources live changes no bit of the result, and what is kept is what it says."""

import itertools

import pytest
import tiny
import torch
from commands import refusal, run
from mergekit.options import MergeOptions

from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.config import Settings, read_recipe
from mergekit_dam.fit import fit, place
from mergekit_dam.fit.place import choose_offload
from mergekit_dam.fit.prepare import prepare
from mergekit_dam.model import Block
from mergekit_dam.model.offload import Arena, InHostMemory

QUIET = MergeOptions(quiet=True)
GB = 10**9


@pytest.mark.parametrize(
    "name, dtype, dam",
    [
        ("llama", "float32", {}),
        ("llama_tied", "bfloat16", {"recompute": "weights"}),
        ("mixtral", "float32", {"recompute": "none"}),
        ("qwen2", "bfloat16", {"formula": "task_vectors"}),
        ("llama", "float32", {"formula": "task_vectors", "sparsify": "dare_ties"}),
    ],
)
def test_the_result_is_the_same_to_the_last_bit(recipe, tmp_path, name, dtype, dam):
    models = tiny.save_models(tmp_path, tiny.CONFIGS[name], 3)
    keys = {"base_model": str(models[2]), "dtype": dtype}
    files = []
    for offload in ("none", "cpu", "disk"):
        path = str(recipe(models[:2], dam={**dam, "offload": offload}, **keys))
        fit(read_recipe(path), str(tmp_path / f"{offload}.safetensors"), QUIET, device="cpu")
        files.append(CoefficientFile(tmp_path / f"{offload}.safetensors"))
    for file in files[1:]:
        for tensor in files[0].names:
            assert torch.equal(file.get(tensor), files[0].get(tensor)), tensor
        assert file.header.results == files[0].header.results


def test_from_disk_one_block_is_there_at_a_time(recipe, tmp_path, monkeypatch):
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    path = str(recipe(models, dam={"offload": "disk"}))
    merged = prepare(read_recipe(path), QUIET, device="cpu").merged
    store, read = merged._weights._store, []
    gather = store._read
    monkeypatch.setattr(store, "_read", lambda names: read.append(names) or gather(names))
    blocks = {tuple(m.names()) for m in merged.model.modules() if isinstance(m, Block)}
    for mode, times in (("block", 2), ("weights", 2), ("none", 2)):
        merged.recompute = mode
        read.clear()
        merged(tiny.tokens()).sum().backward()
        assert set(read) == blocks
        assert len(read) <= times * len(blocks)
        assert set(store._present) in map(set, blocks)


def test_the_next_block_is_fetched_beforehand(recipe, tmp_path, monkeypatch):
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    path = str(recipe(models, dam={"offload": "cpu"}))
    merged = prepare(read_recipe(path), QUIET, device="cpu").merged
    store, copies = merged._weights._store, []
    assert isinstance(store, InHostMemory)

    def step() -> None:
        merged(tiny.tokens()).sum().backward()
        tiny.teach(merged, 1, tiny.tokens())

    for _ in range(2):
        step()
    copy = store._copy
    monkeypatch.setattr(store, "_copy", lambda wanted: copies.append(wanted) or copy(wanted))
    late = 0
    on_device = store._on_device

    def counting(wanted):
        nonlocal late
        late += wanted not in store._copies
        return on_device(wanted)

    monkeypatch.setattr(store, "_on_device", counting)
    step()
    assert late == 0
    assert len(store._copies) <= 2
    blocks = {tuple(m.names()) for m in merged.model.modules() if isinstance(m, Block)}
    assert {names for names, _ in copies} == blocks
    assert {index for _, index in copies} == {None, 1}  # a teacher needs no other's weights


def test_auto_takes_the_first_that_fits_and_says_why():
    settings = Settings(data=())
    assert choose_offload(settings, "cpu", 10 * GB, 20 * GB, 20 * GB) == ("none", "")
    mode, why = choose_offload(settings, "cuda", 42 * GB, 24 * GB, 64 * GB)
    assert mode == "cpu"
    assert "42 GB" in why and "24 GB" in why and "64 GB" in why
    assert choose_offload(settings, "cuda", 42 * GB, 24 * GB, 48 * GB)[0] == "disk"
    assert choose_offload(settings, "cpu", 42 * GB, 24 * GB, 24 * GB)[0] == "disk"
    assert choose_offload(settings, "cuda", 16 * GB, 24 * GB, 64 * GB, 7 * GB)[0] == "none"
    assert choose_offload(settings, "cuda", 16 * GB, 24 * GB, 64 * GB, 9 * GB)[0] == "cpu"
    settings = Settings(data=(), offload="disk")
    assert choose_offload(settings, "cuda", GB, 24 * GB, 48 * GB) == ("disk", "")


def test_auto_is_told_on_the_command_line(recipe, tmp_path, monkeypatch):
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    path = recipe(models)
    monkeypatch.setattr(place, "SOURCES", 1e-9)
    told = run("mergekit-dam", "fit", path).stderr
    assert "offload: disk" in told
    assert "recompute: " in told
    assert "offload" not in run("mergekit-dam", "fit", path, "--quiet").stderr


def test_too_little_memory_is_told_before_the_first_step(recipe, tmp_path, monkeypatch):
    models = tiny.save_models(tmp_path, tiny.CONFIGS["llama"], 2)
    path = recipe(models, dam={"recompute": "none", "offload": "none"})
    needs = prepare(read_recipe(str(path)), QUIET, device="cpu").needs

    def told(free: int) -> str:
        monkeypatch.setattr(place, "free_memory", lambda device: free)
        return refusal("mergekit-dam", "fit", path)

    assert told(needs.of("block")).endswith("free on cpu: set `dam.recompute: block`.")
    path = recipe(models, dam={"recompute": "block"})
    assert told(needs.of("block") - 1).endswith("set `dam.batch_size: 1`.")
    assert told(1000).endswith("no setting would fit.")


def test_an_arena_holds_copies_one_after_the_other():
    arena = Arena(size=8192, pinned=False)
    shapes = [(3, 5), (700,), (), (0, 4), (40, 30), (1000,), (7, 1)]
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    tensors = [
        (100 * torch.randn(shape)).to(dtype) for shape in shapes for dtype in (*dtypes, torch.int8)
    ]
    tensors.append(torch.randn(6, 4).t())  # not contiguous
    copies = [arena.copy(tensor) for tensor in tensors]
    assert all(map(torch.equal, tensors, copies))
    assert all(copy.is_contiguous() for copy in copies)
    pieces = {copy.untyped_storage().data_ptr() for copy in copies if copy.numel()}
    sizes = [copy.untyped_storage().nbytes() for copy in copies]
    assert len(pieces) < len(tensors) / 3
    assert max(sizes) == 16384  # the largest takes a larger piece
    spans = sorted((copy.data_ptr(), copy.nbytes) for copy in copies if copy.numel())
    assert all(one + size <= other for (one, size), (other, _) in itertools.pairwise(spans))
    assert all(start % 64 == 0 for start, _ in spans)


def test_an_arena_wastes_no_rest_that_is_large_enough():
    arena = Arena(size=8192, pinned=False)
    copies = [arena.copy(torch.zeros(n, dtype=torch.uint8)) for n in (5000, 6000, 3000, 2000)]
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 2
