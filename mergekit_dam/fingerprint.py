"""What identifies a source model: its headers, its config and a few bytes of every tensor.

Two fine-tunes of one base have the same headers, so a small sample of each tensor's bytes
tells them apart; gigabytes are never read. How the tensors are spread over shards does not
matter, nor where the folder lies.
"""

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Iterator
from math import prod
from pathlib import Path

from mergekit_dam.errors import DamError

SAMPLE_BYTES = 64
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
# Of a number; what other dtypes the format may get are left to its own reader.
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
# In the order in which mergekit, and PEFT, look for them.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# What saving a model again changes without changing the model.
VOLATILE_CONFIG_KEYS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
# The same of an adapter, and what tells where its base lay.
VOLATILE_ADAPTER_KEYS = ("base_model_name_or_path", "revision", "peft_version", "inference_mode")


def fingerprint(path: str, *, is_adapter: bool = False) -> tuple[str, str | None]:
    """(weights, config): hexadecimal digests of a checkpoint folder or of one weights file.

    A raw weights file has no config (None). Raises DamError for a damaged file.
    """
    if os.path.isfile(path):
        return _digest(sorted(_tensors(Path(path)))), None
    folder = Path(path)
    files = weight_files(folder, is_adapter=is_adapter)
    tensors = sorted(line for file in files for line in _tensors(file))
    if is_adapter:  # its config holds the factor by which it is multiplied
        return _digest(tensors), _adapter_config_digest(folder / "adapter_config.json")
    return _digest(tensors), _config_digest(folder / "config.json")


def weight_files(folder: Path, *, is_adapter: bool = False) -> list[Path]:
    """The files of a checkpoint that mergekit reads, or of an adapter, and no others.

    Raises DamError where there are none.
    """
    names = ADAPTER_FILES if is_adapter else WEIGHT_FILES
    for name in names:
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = set(_json(index).get("weight_map", {}).values())
            return [folder / shard for shard in sorted(shards)]
        if (folder / name).exists():
            return [folder / name]
    raise DamError(f"{folder} holds no weights that mergekit reads, such as {names[0]}.")


def is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says.

    Raises DamError where even the header is damaged.
    """
    with path.open("rb") as file:
        header = _entries(file, path)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        return path.stat().st_size == file.tell() + max(ends, default=0)


def is_sound(path: Path) -> bool:
    """Whether a safetensors file is there, and whole; a disk may have been full. Raises OSError
    where that cannot be seen."""
    try:
        return is_whole(path)
    except (DamError, FileNotFoundError, NotADirectoryError):
        return False


def _digest(lines) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()[:32]


def _config_digest(path: Path) -> str | None:
    if not path.exists():
        return None
    config = _json(path)
    kept = {key: value for key, value in config.items() if key not in VOLATILE_CONFIG_KEYS}
    return _digest([json.dumps(kept, sort_keys=True)])


def _adapter_config_digest(path: Path) -> str | None:
    """PEFT writes sets of names, such as `target_modules`, in an order that changes."""
    if not path.exists():
        return None
    config = _json(path)
    kept = {
        key: sorted(map(str, value)) if isinstance(value, list) else value
        for key, value in config.items()
        if key not in VOLATILE_ADAPTER_KEYS
    }
    return _digest([json.dumps(kept, sort_keys=True)])


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise DamError(f"{path} is damaged (no JSON object): download it again.")
    return content


def _tensors(path: Path) -> Iterator[str]:
    """One line for each tensor of a weights file."""
    if path.suffix == ".safetensors":
        return _safetensors(path)
    return _archive(path)


def _safetensors(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        header = read_header(file, path)
        start = file.tell()
        for name, entry in sorted(header.items()):
            begin, end = entry["data_offsets"]
            samples = []
            for place in (begin, (begin + end) // 2, max(begin, end - SAMPLE_BYTES)):
                file.seek(start + place)
                samples.append(file.read(min(SAMPLE_BYTES, end - place)).hex())
            yield f"{name} {entry['dtype']} {entry['shape']} {' '.join(samples)}"


def read_header(file, path: Path) -> dict[str, dict]:
    """The tensors in the header of an open safetensors file: {"dtype", "shape", "data_offsets"},
    which all lie within the file."""
    header = _entries(file, path)
    room = path.stat().st_size - file.tell()
    if any(entry["data_offsets"][1] > room for entry in header.values()):
        raise _cut_off(path)
    return header


def _entries(file, path: Path) -> dict[str, dict]:
    """The same, even where the file is too short. The header's length is checked before it is
    read."""
    size = path.stat().st_size
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise _cut_off(path)
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        sound = all(_is_entry(entry) for entry in header.values())
    except (ValueError, AttributeError, TypeError, KeyError):
        sound = False
    if not sound:
        raise DamError(f"{path} has a damaged safetensors header: download it again.")
    return header


def _cut_off(path: Path) -> DamError:
    return DamError(f"{path} is not a safetensors file, or is cut off: download it again.")


def _is_entry(entry: dict) -> bool:
    numbers = [*entry.get("shape", [None]), *entry.get("data_offsets", [None])]
    return (
        isinstance(entry.get("dtype"), str)
        and len(entry["data_offsets"]) == 2
        and all(isinstance(number, int) and number >= 0 for number in numbers)
        and _holds_its_shape(entry)
    )


def _holds_its_shape(entry: dict) -> bool:
    begin, end = entry["data_offsets"]
    bits = BITS.get(entry["dtype"])
    return begin <= end and (bits is None or 8 * (end - begin) == bits * prod(entry["shape"]))


def _archive(path: Path) -> Iterator[str]:
    """A `.bin` file is a zip archive, whose directory already holds a checksum of each record;
    nothing is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                # The top folder is named after the file; a copy may be called otherwise.
                yield f"{record.filename.partition('/')[2]} {record.file_size} {record.CRC}"
    except zipfile.BadZipFile:
        raise DamError(f"{path} is not a PyTorch checkpoint: save it as safetensors.") from None
