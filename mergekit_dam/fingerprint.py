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
from pathlib import Path

from mergekit_dam.errors import DamError

SAMPLE_BYTES = 64
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
# In the order in which mergekit looks for them; then those of an adapter.
WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
# What saving a model again changes without changing the model.
VOLATILE_CONFIG_KEYS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def fingerprint(path: str) -> tuple[str, str | None]:
    """(weights, config): hexadecimal digests of a checkpoint folder or of one weights file.

    A raw weights file has no config (None). Raises DamError for a damaged file.
    """
    if os.path.isfile(path):
        return _digest(_tensors(Path(path))), None
    tensors = sorted(line for file in weight_files(Path(path)) for line in _tensors(file))
    return _digest(tensors), _config_digest(Path(path) / "config.json")


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that mergekit reads (or an adapter's), and no others.

    Raises DamError where there are none.
    """
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = set(_json(index).get("weight_map", {}).values())
            return [folder / shard for shard in sorted(shards)]
        if (folder / name).exists():
            return [folder / name]
    raise DamError(f"{folder} holds no weights that mergekit reads, such as {WEIGHT_FILES[0]}.")


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
            middle = (begin + end) // 2
            file.seek(start + middle)
            sample = file.read(min(SAMPLE_BYTES, end - middle)).hex()
            yield f"{name} {entry['dtype']} {entry['shape']} {sample}"


def read_header(file, path: Path) -> dict[str, dict]:
    """The tensors in the header of an open safetensors file: {"dtype", "shape", "data_offsets"}.

    The header's length is checked before it is read.
    """
    size = path.stat().st_size
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise DamError(f"{path} is not a safetensors file, or is cut off: download it again.")
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        sound = all(_is_entry(entry) for entry in header.values())
    except (ValueError, AttributeError, TypeError, KeyError):
        sound = False
    if not sound:
        raise DamError(f"{path} has a damaged safetensors header: download it again.")
    return header


def _is_entry(entry: dict) -> bool:
    numbers = [*entry.get("shape", [None]), *entry.get("data_offsets", [None])]
    return (
        isinstance(entry.get("dtype"), str)
        and len(entry["data_offsets"]) == 2
        and all(isinstance(number, int) and number >= 0 for number in numbers)
    )


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
