"""Going on with a fit that was killed, and never with another one's checkpoints."""

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pydantic
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME

from mergekit_dam.coefficients import Figures, Header, Source
from mergekit_dam.config.settings import STARTS
from mergekit_dam.data import SourceData
from mergekit_dam.errors import DamError
from mergekit_dam.fit import processes
from mergekit_dam.fit.trainer import checkpoints, is_whole, last_checkpoint
from mergekit_dam.places import PARTIAL, tells_of_full_disk, whole
from mergekit_dam.sources import contents

HOW = ("report_to", "recompute", "offload")  # settings that change no result
PROGRESS = "start.safetensors"  # coefficients of the blocks that the start has solved
BEGINNING = "beginning.json"  # the figures of the start
BEST = "best.safetensors"  # the best coefficients of the evaluations on the way
RECORD = "fit.json"  # tells which fit the checkpoints beside it belong to

FIGURES = pydantic.TypeAdapter(tuple[Figures, ...])
LOGS = "runs"  # what tensorboard keeps there; it stays when a fit is done


def folder_of(out: str | Path) -> Path:
    """Where the fit of a coefficient file keeps what it can go on with."""
    return Path(f"{out}.fit")


def states_of(folder: Path) -> Path:
    """Where it keeps its teachers' states."""
    return folder.with_suffix(".teachers")


def identity(
    header: Header, data: Sequence[SourceData], dtype: torch.dtype, base: Source | None
) -> dict[str, Any]:
    """All that must be the same for two fits to be one; `dtype` is that of the forward pass, `base`
    gives the merge its config."""
    settings = {key: value for key, value in header.settings.items() if key not in HOW}
    start = header.settings.get("start")
    same = {
        **{f"dam.{key}": value for key, value in settings.items()},
        **header.merge,
        "contents of the sources": [source.model_dump() for source in header.sources],
        "contents of the base": header.base and header.base.model_dump(),
        "rows of the data": [rows.digest() for rows in data],
        "config of the base": base and base.config,
        "contents of the start": None if start in STARTS else contents([start]),
        "processes": processes.count(),
        "compute dtype": str(dtype),
        "versions": [header.package, *map(version, ("mergekit", "torch", "transformers"))],
    }
    return json.loads(json.dumps(same))  # as it will be read again


def digest(same: Any) -> str:
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:32]


def require_place(folder: Path, *, resume: bool) -> None:
    """Raises DamError rather than lose an earlier fit, or what is no fit's."""
    if problem := foreign_problem(folder):
        raise DamError(f"{problem}.")
    if resume:
        return
    if last_checkpoint(folder) is not None:
        raise DamError(
            f"{folder} holds checkpoints of a fit that was interrupted: continue it with "
            "--resume, or remove the folder to start over."
        )
    # Another process may come here when the first one, which has looked, solves already.
    if processes.is_main() and (folder / PROGRESS).exists():
        raise DamError(
            f"{folder} holds the solved part of a fit that was interrupted in its least-squares "
            "start: continue it with --resume, or remove the folder to start over."
        )


def find_checkpoint(folder: Path, same: dict[str, Any], *, resume: bool) -> str | None:
    """The checkpoint to go on from, if any; None begins the folder anew, unless a fit that is
    resumed had come to its start. Raises DamError rather than mix up two fits.

    `same` is the identity of the fit that is to go on.
    """
    last = last_checkpoint(folder)
    if last is None and not (resume and (folder / PROGRESS).exists()):
        if processes.is_main():
            _begin(folder, same)
        return None
    earlier = _read(folder / RECORD)
    changed = sorted(key for key in {*same, *earlier} if same.get(key) != earlier.get(key))
    if changed:
        raise DamError(
            f"{folder} was begun with other settings ({', '.join(changed)}): restore them to "
            "resume, or remove the folder to start over."
        )
    if processes.is_main():
        _remove_damaged(folder)
    return last


def _begin(folder: Path, same: dict[str, Any]) -> None:
    _remove_damaged(folder)
    for path in _kept_files(folder):
        path.unlink(missing_ok=True)
    _write(folder / RECORD, same)


def _remove_damaged(folder: Path) -> None:
    """The Trainer would write over such a checkpoint, file by file: killed meanwhile, it would
    leave a mix of two that looks whole."""
    for checkpoint in checkpoints(folder):
        if not is_whole(checkpoint):
            _remove(checkpoint)


def _remove(checkpoint: Path) -> None:
    """Killed meanwhile, it leaves none that looks whole, as the Trainer's state goes first."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    with contextlib.suppress(OSError):
        (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def belongs(folder: Path, same: dict[str, Any]) -> bool:
    """Whether a folder holds nothing of another fit than the one with this identity."""
    if not (folder / RECORD).exists():
        return True
    try:
        return _read(folder / RECORD) == same
    except DamError:
        return False


def foreign_problem(folder: Path) -> str:
    """Why the fit cannot keep its checkpoints in a folder; nothing where it can."""
    if last_checkpoint(folder) is not None or not _is_foreign(folder):
        return ""
    return (
        f"{folder} is there and holds no fit's checkpoints, for which the fit would use it: move "
        "it away, or give the coefficient file another name"
    )


def _is_foreign(folder: Path) -> bool:
    if not folder.is_dir():
        return folder.exists()
    # What may be there before a fit has its record. Listed once: another process may write it now.
    others = [p for p in folder.iterdir() if p.name != LOGS and not p.match(PARTIAL)]
    return bool(others) and not (folder / RECORD).exists()


def discard_empty(folder: Path) -> None:
    """A fit that ended before its first checkpoint, or a start that ended before its first block,
    leaves nothing to go on from."""
    if last_checkpoint(folder) is None and not (folder / PROGRESS).exists():
        discard(folder)


def discard(folder: Path) -> None:
    """Remove the checkpoints of a fit, and nothing else that may lie beside them. The record, which
    tells that they are a fit's, goes last."""
    if not processes.is_main():
        return
    if (folder / RECORD).exists():
        for checkpoint in checkpoints(folder):
            _remove(checkpoint)
        for path in (*_kept_files(folder), folder / RECORD):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # logs of the Trainer's integrations stay
        folder.rmdir()


def _kept_files(folder: Path) -> Iterator[Path]:
    """What lies beside the checkpoints, but for the record."""
    return itertools.chain(
        (folder / name for name in (PROGRESS, BEGINNING, BEST)), folder.glob(PARTIAL)
    )


def keep(path: Path, coefficients: Mapping[str, Tensor], **metadata: str) -> None:
    """Write coefficients of a fit that is under way, whole or not at all."""
    tensors = {name: c.detach().cpu().contiguous() for name, c in coefficients.items()}
    with whole(path) as partial:
        partial.write_bytes(safetensors.torch.save(tensors, metadata or None))


def keep_figures(folder: Path, figures: Sequence[Figures]) -> None:
    """Those with which a fit begins, for when it goes on."""
    if processes.is_main():
        with whole(folder / BEGINNING) as partial:
            partial.write_bytes(FIGURES.dump_json(tuple(figures)))


def kept_figures(folder: Path) -> Sequence[Figures] | None:
    try:
        return FIGURES.validate_json((folder / BEGINNING).read_bytes())
    except (OSError, ValueError):
        return None


def kept(path: Path, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `keep` has written, and its metadata; nothing where it is not sound, or holds others
    than tensors that are like the given ones."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in names:
                shape = tuple(file.get_slice(name).get_shape())
                if name not in like or shape != tuple(like[name].shape):
                    return {}, {}
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (safetensors.SafetensorError, OSError):
        return {}, {}


def _write(record: Path, same: dict[str, Any]) -> None:
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        with whole(record) as partial:
            partial.write_text(json.dumps(same), encoding="utf-8")
    except OSError as error:
        raise unwritable(record.parent, error) from error


def full_disk(folder: Path) -> DamError:
    return DamError(
        f"The disk of {folder.parent} is full: make room and go on with --resume. Earlier "
        "checkpoints and coefficient files are whole."
    )


def unwritable(folder: Path, error: OSError) -> DamError:
    if tells_of_full_disk(error):
        return full_disk(folder)
    return DamError(
        f"{folder} cannot be written ({error.strerror}): the fit keeps its checkpoints there, "
        "beside the coefficient file; give a path in a folder of yours."
    )


def _read(record: Path) -> dict[str, Any]:
    try:
        earlier = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = None
    if not isinstance(earlier, dict) or "versions" not in earlier:
        raise DamError(
            f"{record} is missing or damaged, so nothing tells which fit the checkpoints beside "
            "it belong to: remove the folder to start over."
        )
    return earlier
