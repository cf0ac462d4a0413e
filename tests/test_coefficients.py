"""The coefficient file: written whole or not at all, read lazily, refused in one clear sentence."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from mergekit_dam import coefficients as module
from mergekit_dam.coefficients import (
    CoefficientFile,
    Figures,
    Header,
    Point,
    Results,
    Source,
    open_file,
    save,
)
from mergekit_dam.errors import DamError
from mergekit_dam.places import tidy

NAME = "model.layers.0.mlp.up_proj.weight"
SOURCES = tuple(Source(reference=f"./m{i}", weights=f"{i:032x}", config="c" * 32) for i in (0, 1))


def header(**fields: Any) -> Header:
    defaults = {
        "package": "0.1.0",
        "formula": "weights",
        "granularity": "column",
        "sources": SOURCES,
    }
    return Header(**{**defaults, **fields})


def values(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {NAME: (2, 1, 5), "model.norm.weight": (2, 5), "lm_head.bias": (2, 1)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "dam.safetensors"


def write_raw(
    path: Path, tensors: dict[str, Tensor], fields: Any = None, metadata: dict | None = None
) -> Path:
    """A file as somebody else's program would write it: no check of ours."""
    if metadata is None:
        metadata = {module.METADATA_KEY: json.dumps(fields)}
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    return path


def results(sources: int) -> Results:
    figures = Figures(tokens=7, kl=0.25, perplexity=3.5, source_perplexity=2.5)
    history = (Point(step=1, loss=0.5),)
    return Results(average=(figures,) * sources, fit=(figures,) * sources, history=history)


def refusal(action: Callable[[], Any]) -> str:
    """The one sentence with which an action is refused."""
    with pytest.raises(DamError) as caught:
        action()
    message = caught.value.message
    assert "\n" not in message
    assert message.endswith(".")
    return message


# ---- save and load


def test_what_is_saved_is_loaded(path: Path) -> None:
    full = header(
        formula="task_vectors",
        base=Source(reference="./base", revision="main", weights="b" * 32),
        tokenizer={"source": "union"},
        settings={"steps": 200, "objective": {"kl": 1.0}},
        identity="é",
        results=results(len(header().sources)),
    )
    save(path, values(), full)
    file = CoefficientFile(path)
    assert file.header == full
    assert file.names == values().keys()
    for name, expected in values().items():
        assert name in file
        assert file.shape(name) == tuple(expected.shape)
        assert torch.equal(file.get(name), expected)


def test_file_holds_float32_whatever_it_was_given(path: Path) -> None:
    odd = torch.randn(5, 2, dtype=torch.float64).T.requires_grad_()  # not contiguous either
    save(path, {NAME: odd}, header())
    stored = safetensors.torch.load_file(path)[NAME]
    assert stored.dtype == torch.float32
    assert torch.equal(stored, odd.detach().float())


def test_folders_are_made(tmp_path: Path) -> None:
    save(tmp_path / "a" / "b" / "dam.safetensors", values(), header())
    assert (tmp_path / "a" / "b" / "dam.safetensors").is_file()


def test_header_is_one_metadata_entry(path: Path) -> None:
    save(path, values(), header())
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert list(metadata) == ["mergekit_dam"]
    assert json.loads(metadata["mergekit_dam"])["version"] == 1


def test_header_refuses_fields_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="granularty"):
        header(granularty="column")


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    program = (
        "import sys, torch\n"
        "from mergekit_dam.coefficients import Header, Source, save\n"
        "header = Header(package='0', formula='weights', granularity='column',\n"
        "    sources=(Source(reference='a', weights='0'),), settings={'z': 1, 'a': [2]},\n"
        "    identity='0')\n"
        "save(sys.argv[1], {f't{i}': torch.full((1, i), 0.5) for i in range(1, 20)}, header)\n"
    )
    files = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(file)],
            env={**os.environ, "PYTHONHASHSEED": file.stem},
        )
        for file in files
    ]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    assert files[0].read_bytes() == files[1].read_bytes()


# ---- atomic, and nothing is lost


def test_every_earlier_file_is_kept(path: Path) -> None:
    kept = []
    for number in range(4):
        save(path, {NAME: values()[NAME] + number}, header())
        kept.append(path.read_bytes())
    names = ("dam.previous", "dam.previous-2", "dam.previous-3")
    assert [(path.parent / f"{name}.safetensors").read_bytes() for name in names] == kept[:3]


def test_an_earlier_different_file_is_kept_as_previous(path: Path) -> None:
    save(path, values(0), header())
    earlier = path.read_bytes()
    save(path, values(1), header())
    assert torch.equal(CoefficientFile(path).get(NAME), values(1)[NAME])
    assert (path.parent / "dam.previous.safetensors").read_bytes() == earlier
    assert len(list(path.parent.iterdir())) == 2


def test_the_same_file_again_leaves_no_previous(path: Path) -> None:
    for _ in range(2):
        save(path, values(), header())
    assert list(path.parent.iterdir()) == [path]


def test_a_writer_that_was_killed_keeps_an_earlier_file_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(path, values(0), header())
    earlier, replace = path.read_bytes(), os.replace

    def killed(source: Path, target: Path) -> None:
        if target == path:  # the earlier file's copy is there
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        save(path, values(1), header())
    save(path, values(1), header())
    copy = path.parent / "dam.previous.safetensors"
    assert copy.read_bytes() == earlier
    assert set(path.parent.iterdir()) == {path, copy}


def test_what_killed_writers_have_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "a[b].safetensors"
    left = [".a[b].safetensors.partial-7", ".a[b].previous-2.safetensors.partial-7"]
    others = [
        ".b.safetensors.partial-7", ".ab.safetensors.partial-7",
        ".a[b].previous.best.safetensors.partial-7",  # of another fit
        ".a[b].safetensors.partial-8",  # a merge's folder
    ]  # fmt: skip
    (tmp_path / others[-1]).mkdir()
    for name in (*left, *others[:-1]):
        (tmp_path / name).touch()
    tidy(path)
    assert {other.name for other in tmp_path.iterdir()} == set(others)


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_failing_writer_leaves_the_earlier_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    save(path, values(0), header())
    earlier = path.read_bytes()
    monkeypatch.setattr(os, function, no_space)
    with pytest.raises(OSError, match="No space"):
        save(path, values(1), header())
    assert path.read_bytes() == earlier
    assert list(path.parent.iterdir()) == [path]


def test_a_failing_writer_leaves_nothing_where_nothing_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="No space"):
        save(path, values(), header())
    assert list(path.parent.iterdir()) == []


def test_there_is_a_whole_file_under_the_name_at_every_moment(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer may be killed before any of its steps."""
    save(path, values(0), header())
    seen: list[bool] = []

    def watch(name: str) -> None:
        real = getattr(os, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            seen.append(path.is_file() and NAME in CoefficientFile(path))
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, watched)

    for name in ("replace", "rename", "link", "unlink", "fsync"):
        watch(name)
    save(path, values(1), header())
    assert seen
    assert all(seen)


# ---- refusals


def test_missing_file(path: Path) -> None:
    for reader in (CoefficientFile, open_file):
        message = refusal(lambda reader=reader: reader(path))
        assert f"{path} does not exist" in message
        assert "mergekit-dam fit" in message


@pytest.mark.parametrize("content", [b"", b"weights", b"PK\x03\x04" + b"\0" * 200, b"\xff" * 64])
def test_not_safetensors(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert f"{path} is not a safetensors file" in refusal(lambda: CoefficientFile(path))


@pytest.mark.parametrize("kept", [4, 40, -1])
def test_truncated(path: Path, kept: int) -> None:
    save(path, values(), header())
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(lambda: CoefficientFile(path))
    assert f"{path} is not a safetensors file" in message
    assert "download it again" in message


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_another_safetensors_file(path: Path, metadata: dict) -> None:
    write_raw(path, values(), metadata=metadata)
    message = refusal(lambda: CoefficientFile(path))
    assert "holds no merge coefficients" in message
    assert "parameters.coefficients" in message


@pytest.mark.parametrize("version", [2, 0, None, "x"])
def test_unknown_version(path: Path, version: Any) -> None:
    # A later version may have fields that this one does not know.
    write_raw(path, values(), header().model_dump() | {"version": version, "new_field": 1})
    message = refusal(lambda: CoefficientFile(path))
    assert f"format version {version}" in message
    assert "update mergekit-dam" in message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"formula": "magic"}, "formula"),
        ({"granularity": None}, "granularity"),
        ({"sources": [{"reference": "./m0"}]}, "sources.0.weights"),
        ({"sources": 3}, "sources"),
        ({"surprise": 1}, "surprise"),
        ({"sources": [{"reference": "m", "weights": "w", "teaches": False}]}, "the header"),
        ({"results": {"average": [], "fit": 3}}, "results.fit"),
    ],
)
def test_damaged_metadata_names_the_field(path: Path, change: dict, named: str) -> None:
    fields = json.loads(header().model_dump_json()) | change
    message = refusal(lambda: CoefficientFile(write_raw(path, values(), fields)))
    assert f"damaged metadata ({named}: " in message


def prepared(lists: dict | None = None, name: str = NAME, **fields: Any) -> dict:
    """A header of sparsified task vectors, as a file holds it."""
    own = {"weight": [0.5] * 2, "density": [0.3] * 2, "gamma": [0.0] * 2, "epsilon": [0.0] * 2}
    own |= {"normalize": True, "rescale": False, "scale": 1.0, **(lists or {})}
    fields = {"formula": "task_vectors", "base": SOURCES[0].model_dump(), **fields}
    preparation = {"method": "ties", "seed": 0, "tensors": {name: own}}
    return header().model_dump(mode="json") | {"preparation": preparation} | fields


@pytest.mark.parametrize(
    "change",
    [
        {"lists": {"weight": [0.5]}},
        {"lists": {"density": []}},
        {"lists": {key: [0.5] for key in ("weight", "density", "gamma", "epsilon")}},
        {"lists": {"density": [0.3, 0.0]}},
        {"lists": {"density": [0.3, float("nan")]}},
        {"lists": {"gamma": [0.0, 1.0]}},
        {"lists": {"scale": float("inf")}},
        {"formula": "weights"},
    ],
    ids=str,
)
def test_a_preparation_that_is_damaged(path: Path, change: dict) -> None:
    tensors = {NAME: torch.ones(2, 1, 5)}
    assert CoefficientFile(write_raw(path, tensors, prepared())).header.preparation is not None
    message = refusal(lambda: CoefficientFile(write_raw(path, tensors, prepared(**change))))
    assert "has damaged metadata" in message


def test_a_preparation_without_a_tensor(path: Path) -> None:
    write_raw(path, {NAME: torch.ones(2, 1, 5)}, prepared(name="another"))
    message = refusal(lambda: CoefficientFile(path))
    assert f"does not say how {NAME} was sparsified: fit it again" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"text"'])
def test_metadata_that_is_no_record(path: Path, text: str) -> None:
    write_raw(path, values(), metadata={module.METADATA_KEY: text})
    assert "damaged metadata (the header: " in refusal(lambda: CoefficientFile(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite(path: Path, value: float) -> None:
    tensors = values()
    tensors[NAME][1, 0, 3] = value
    save(path, tensors, header())
    file = CoefficientFile(path)
    message = refusal(lambda: file.get(NAME))
    assert f"{NAME} holds NaN or infinity" in message
    assert "dam.learning_rate" in message
    assert torch.isfinite(file.get("model.norm.weight")).all()  # the others can be read


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int32])
def test_wrong_dtype(path: Path, dtype: torch.dtype) -> None:
    write_raw(path, {NAME: torch.ones(2, 1, 5, dtype=dtype)}, json.loads(json_header()))
    message = refusal(lambda: CoefficientFile(path).get(NAME))
    assert f"{NAME} is {dtype}, not float32" in message


@pytest.mark.parametrize("shape", [(), (3, 1, 5), (1, 5), (0, 5)])
def test_first_axis_that_is_not_the_number_of_sources(path: Path, shape: tuple[int, ...]) -> None:
    write_raw(path, {NAME: torch.ones(shape)}, json.loads(json_header()))
    message = refusal(lambda: CoefficientFile(path).get(NAME))
    assert f"{NAME} has shape {list(shape)}" in message
    assert "number of sources, 2" in message


@pytest.mark.parametrize("shape", [(6, 4), (5, 6), (5,), (1, 6, 5), (6,), ()])
def test_wrong_shape(path: Path, shape: tuple[int, ...]) -> None:
    save(path, values(), header())
    message = refusal(lambda: CoefficientFile(path).check_shape(NAME, shape))
    assert f"the coefficients of {NAME} have shape [1, 5]" in message
    assert f"the tensor has shape {list(shape)}" in message


@pytest.mark.parametrize(
    ("factors", "shape"),
    [((1, 5), (6, 5)), ((6, 1), (6, 5)), ((1, 1), (6, 5)), ((6, 5), (6, 5)), ((1,), (5,))],
)
def test_shape_that_broadcasts_is_taken(
    path: Path, factors: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    save(path, {NAME: torch.ones(2, *factors)}, header())
    CoefficientFile(path).check_shape(NAME, shape)  # refuses nothing
    assert torch.broadcast_shapes(factors, shape) == shape


@pytest.mark.parametrize("method", ["get", "shape"])
def test_missing_tensor(path: Path, method: str) -> None:
    save(path, values(), header())
    file = CoefficientFile(path)
    message = refusal(lambda: getattr(file, method)("model.layers.9.weight"))
    assert re.search(r"no coefficients for the tensor model\.layers\.9\.weight\b", message)
    assert "fit it again" in message
    assert "model.layers.9.weight" not in file


# ---- reading


def json_header() -> str:
    return header().model_dump_json()


def test_eight_threads_read_the_same_numbers(path: Path) -> None:
    tensors = {f"t{i}": torch.full((2, 1, 500), float(i)) for i in range(40)}
    save(path, tensors, header())

    def read(worker: int) -> bool:
        names = [f"t{(i * (worker + 1)) % 40}" for i in range(80)]
        file = open_file(path)
        return all(
            torch.equal(file.get(n), tensors[n]) and file.shape(n) == (2, 1, 500) for n in names
        )

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(8))) == [True] * 8


def test_a_reader_is_shared_until_the_file_changes(path: Path) -> None:
    save(path, values(0), header())
    os.utime(path, ns=(1, 1))
    first = open_file(path)
    assert open_file(path) is first
    save(path, values(1), header())
    assert torch.equal(open_file(path).get(NAME), values(1)[NAME])
    assert torch.equal(first.get(NAME), values(0)[NAME])  # a merge under way is not disturbed


def test_tensors_are_read_one_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(path, values(), header())
    file, asked = CoefficientFile(path), []
    real = file._file

    class Spy:
        def get_tensor(self, name: str) -> Tensor:
            asked.append(name)
            return real.get_tensor(name)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    monkeypatch.setattr(file, "_file", Spy())
    assert file.shape("lm_head.bias") == (2, 1)
    assert asked == []
    file.get(NAME)
    assert asked == [NAME]
