"""Files from strangers: thousands of damaged ones, each refused in a sentence or read rightly."""

import json
import resource
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergekit_dam import card, inspection, report
from mergekit_dam.coefficients import (
    METADATA_KEY,
    CoefficientFile,
    Figures,
    Header,
    Point,
    Results,
    Source,
    is_coefficient_file,
    save,
)
from mergekit_dam.convert import to_linear
from mergekit_dam.errors import DamError
from mergekit_dam.fingerprint import fingerprint, is_whole
from mergekit_dam.summary import statistics

MANY = settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def sound(path: Path, **fields: Any) -> bytes:
    """A whole file with everything that a header can hold."""
    figures = Figures(tokens=7, kl=0.25, perplexity=3.5, source_perplexity=2.5)
    header = Header(
        package="0.1.0",
        formula="weights",
        granularity="tensor",
        sources=tuple(Source(reference=f"./m{i}", weights=f"{i:032x}") for i in (0, 1)),
        settings={"steps": 3},
        merge={"merge_method": "dam"},
        results=Results(
            average=(figures,) * 2, fit=(figures,) * 2, history=(Point(step=1, loss=0.5),)
        ),
    ).model_copy(update=fields)
    tensors = {"model.layers.0.up.weight": torch.ones(2, 1, 1), "norm.weight": torch.ones(2, 4)}
    save(path, tensors, header)
    return path.read_bytes()


def parts(data: bytes) -> tuple[dict, bytes]:
    """The header of a safetensors file, and its tensors' bytes."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def use(path: Path) -> bool:
    """All that a merge does with a file; whether it was sound. Nothing but a DamError may end it,
    and what is read is what may be merged."""
    is_coefficient_file(path)
    try:
        file = CoefficientFile(path)
        for name in file.names:
            values = file.get(name)
            assert values.dtype == torch.float32
            assert len(values) == len(file.header.sources) > 0
            assert values.numel() > 0 and torch.isfinite(values).all()
            file.check_shape(name, tuple(values.shape[1:]))
        inspection.as_text(file, statistics(file))
    except DamError as error:
        assert "\n" not in error.message and len(error.message) < 2000
        assert error.message.isprintable()
        return False
    return True


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    return sound(tmp_path_factory.mktemp("sound") / "dam.safetensors")


@pytest.fixture
def memory(tmp_path: Path, whole: bytes):
    """No file of a few kilobytes makes us allocate much."""
    (tmp_path / "warm.safetensors").write_bytes(whole)
    assert use(tmp_path / "warm.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


@MANY
@given(data=st.data())
def test_damaged_bytes(tmp_path: Path, whole: bytes, memory, data):
    """Cut off, overwritten, with bytes put in or taken out."""
    path = tmp_path / "dam.safetensors"
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(len(damaged) - 1, 0)))
        how = data.draw(st.sampled_from(["cut", "write", "insert", "remove", "length"]))
        some = data.draw(st.binary(max_size=12))
        if how == "cut":
            del damaged[place:]
        elif how == "write":
            damaged[place : place + len(some)] = some
        elif how == "insert":
            damaged[place:place] = some
        elif how == "remove":
            del damaged[place : place + len(some)]
        else:
            number = data.draw(st.integers(0, 2**64 - 1) | st.integers(0, 2**20))
            damaged[:8] = struct.pack("<Q", number)
    path.write_bytes(damaged)
    use(path)


NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 8, 40, 2**31, 2**63, 2**64, 10**30, 0.5, None, "2", []])
DTYPES = st.sampled_from(
    ["F32", "F64", "F16", "BF16", "F8_E4M3", "F4", "I64", "U8", "BOOL", "C64", "X", "", None, 3]
)


@MANY
@given(data=st.data())
def test_damaged_tensors(tmp_path: Path, whole: bytes, memory, data):
    """A header of the format that tells lies about dtypes, shapes and places."""
    header, body = parts(whole)
    name = data.draw(st.sampled_from([n for n in header if n != "__metadata__"]))
    entry = header[name]
    how = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "key", "name", "body"]))
    if how == "dtype":
        entry["dtype"] = data.draw(DTYPES)
    elif how in ("shape", "data_offsets"):
        entry[how] = data.draw(st.lists(NUMBERS, max_size=70) | NUMBERS)
    elif how == "key":
        entry.pop(data.draw(st.sampled_from(sorted(entry))))
    elif how == "name":
        header[data.draw(st.text(max_size=30))] = header.pop(name)
    else:
        body = data.draw(st.binary(min_size=len(body), max_size=len(body)))
    path = tmp_path / "dam.safetensors"
    path.write_bytes(joined(header, body))
    use(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data_offsets": [1, 0]}, "a damaged safetensors header"),
        ({"data_offsets": [100, 0]}, "a damaged safetensors header"),
        ({"data_offsets": [0, 4]}, "a damaged safetensors header"),
        ({"shape": [2**62, 2**62]}, "a damaged safetensors header"),
        ({"shape": [2**40], "data_offsets": [0, 2**42]}, "is cut off"),
    ],
    ids=str,
)
def test_a_source_whose_header_tells_lies(tmp_path: Path, whole: bytes, change: dict, told: str):
    """Nothing is read by places that cannot be."""
    header, body = parts(whole)
    header["norm.weight"] |= change
    path = tmp_path / "model.safetensors"
    path.write_bytes(joined(header, body))
    with pytest.raises(DamError, match=told):
        fingerprint(str(path))


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("F4", [3, 2], 3), ("BOOL", [3], 3), ("F32", [0, 9], 0), ("F99", [1], 7)],
)
def test_sources_of_all_dtypes_are_read(tmp_path: Path, dtype: str, shape: list[int], size: int):
    path = tmp_path / "model.safetensors"
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    path.write_bytes(joined({"w": entry}, bytes(size)))
    assert len(fingerprint(str(path))[0]) == 32
    assert is_whole(path)
    path.write_bytes(path.read_bytes() + b"1")
    assert not is_whole(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def places(value: Any, way: tuple = ()) -> list[tuple]:
    """Every place of parsed JSON."""
    if not isinstance(value, dict | list):
        return []
    found = []
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        found += [(*way, key), *places(item, (*way, key))]
    return found


@MANY
@given(data=st.data())
def test_damaged_metadata(tmp_path: Path, whole: bytes, memory, data):
    """Our own header with anything in any place."""
    header, body = parts(whole)
    fields = json.loads(header["__metadata__"][METADATA_KEY])
    for _ in range(data.draw(st.integers(1, 3))):
        way = data.draw(st.sampled_from(places(fields) or [("version",)]))
        place = fields
        for key in way[:-1]:
            place = place[key]
        if data.draw(st.booleans()) or not isinstance(place, dict):
            place[way[-1]] = data.draw(JSON)
        else:
            place[data.draw(st.text(max_size=20))] = data.draw(JSON)
    text = json.dumps(fields)
    header["__metadata__"][METADATA_KEY] = data.draw(st.sampled_from([text, text[:-3], text * 2]))
    path = tmp_path / "dam.safetensors"
    path.write_bytes(joined(header, body))
    use(path)


def test_damage_of_every_sort_is_met(tmp_path: Path):
    """The tests above would pass if nothing were ever read."""
    whole = sound(tmp_path / "dam.safetensors")
    assert use(tmp_path / "dam.safetensors")
    for damaged in (whole[:-1], whole[:20], b"", whole.replace(b'"F32"', b'"F16"', 1)):
        (tmp_path / "dam.safetensors").write_bytes(damaged)
        assert not use(tmp_path / "dam.safetensors")


@pytest.mark.parametrize("deep", [10**2, 10**5])
def test_metadata_that_go_deep(tmp_path: Path, deep: int):
    header, body = parts(sound(tmp_path / "dam.safetensors"))
    nested = "[" * deep + "]" * deep
    text = header["__metadata__"][METADATA_KEY].replace('"steps":3', f'"steps":{nested}')
    header["__metadata__"][METADATA_KEY] = text
    (tmp_path / "dam.safetensors").write_bytes(joined(header, body))
    use(tmp_path / "dam.safetensors")


def test_no_path_in_the_metadata_is_opened(tmp_path: Path):
    """Not by the reader, nor by anything that shows a file."""
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    source = Source(reference=str(secret), weights=str(secret), config=str(secret))
    path = tmp_path / "dam.safetensors"
    sound(
        path,
        sources=(source, source),
        tokenizer=str(secret),
        settings={"data": [{"source": str(secret), "path": str(secret)}]},
        merge={"base_model": str(secret), "models": [{"model": str(secret)}]},
        identity=str(secret),
    )
    opened: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple) -> None:
        if watching and event in ("open", "os.listdir", "os.scandir", "os.remove", "os.rename"):
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    try:
        assert use(path)
        file = CoefficientFile(path)
        report.write_page(file, str(tmp_path / "dam.html"))
        card.of_file(file.header, "me/coefficients")
        to_linear(file)
    finally:
        watching = False
    assert [name for name in opened if "dam.html" in name]  # the hook sees what is opened
    assert not [name for name in opened if "secret" in name]
    assert secret.read_text() == "secret"


def test_nothing_on_our_paths_is_unpickled():
    """The word stands in comments alone; torch.load is called with weights_only."""
    package = Path(inspection.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text and "pickle.load" not in text
        for place in text.split("torch.load(")[1:]:
            assert "weights_only=True" in place.partition(")\n")[0], path
