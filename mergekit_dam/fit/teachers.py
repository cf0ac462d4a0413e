"""What the sources make of their rows, computed once and kept on disk.

A source's final states are kept, in the dtype of the forward pass: [tokens, width], much smaller
than its logits, which its head makes of them anew. A pass over the rows of one source needs that
source's weights alone.
"""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from mergekit_dam.config import Settings
from mergekit_dam.data import Row, together
from mergekit_dam.errors import DamError
from mergekit_dam.fingerprint import is_sound
from mergekit_dam.fit import processes
from mergekit_dam.fit.batches import StepRows, batch
from mergekit_dam.fit.memory import size
from mergekit_dam.fit.objective import row_states
from mergekit_dam.fit.workload import items_of_a_fit
from mergekit_dam.model import MergedModel
from mergekit_dam.places import free_disk, whole

TOKENS = 8192  # of a file
FILE = re.compile(r"\.?\d+-[0-9a-f]{24}\.safetensors(\.partial-\d+)?")


class KeptTeachers:
    """Gives a source's states on rows, from files where they are there.

    A file's name is made of its rows, of how many of them go through the source at once, which
    changes the last bits, and of `fingerprint`, which stands for the source and all else that the
    states depend on: what belongs to another fit is never taken for this one's.
    """

    def __init__(
        self,
        merged: MergedModel,
        folder: Path,
        fingerprint: str,
        tokens: int = TOKENS,  # that go through a source at once
        rows: int | None = None,  # at most
    ):
        self._merged, self._folder, self._fingerprint = merged, folder, fingerprint
        self._at_once = tokens, rows
        self._files: dict[tuple[int, str], Path] = {}

    def __call__(
        self, source: int, input_ids: Tensor, lengths: Tensor, starts: Tensor
    ) -> list[Tensor] | None:
        """For each row [tokens, width], as `row_states` does it; None where one is not kept."""
        keys = [
            _key(Row(ids[:length].tolist(), start))
            for ids, length, start in zip(input_ids, lengths.tolist(), starts.tolist(), strict=True)
        ]
        if any((source, key) not in self._files for key in keys):
            return None
        found = [self._read(self._files[source, key], key) for key in keys]
        return [states.to(input_ids.device) for states in found]

    def keep(self, rows: Sequence[Sequence[Row]], wait: Callable[[], None] = lambda: None) -> None:
        """Compute what is not there yet, one source after the other; each of several processes a
        share, before and after which `wait` waits for the others.

        Killed at any moment, it goes on where it was. Raises DamError for a full disk.
        """
        files = [
            (source, some)
            for source, own in enumerate(rows)
            for some in together({_key(row): row for row in own}.values(), TOKENS)
        ]
        if processes.rank_here() == 0:
            self._make_room(files)
        wait()  # nobody writes before
        for source, some in files[processes.rank() :: processes.count()]:
            self._keep(source, some)
        wait()
        for source, some in files:  # the others', too, where their disk is not this one
            self._keep(source, some)

    def _make_room(self, files: Sequence[tuple[int, Sequence[Row]]]) -> None:
        """Remove what other fits have left here, and see that the rest of these files fits."""
        missing = {self._path(*own): own[1] for own in files}
        for path in _files(self._folder):
            if path not in missing:
                path.unlink(missing_ok=True)
            elif is_sound(path):
                del missing[path]
        width = self._merged.model.config.get_text_config().hidden_size
        needed = bytes_of(missing.values(), width, self._merged.dtype)
        free = free_disk(self._folder)
        if needed > free:
            raise DamError(
                f"The teachers' states need {size(needed)} on the disk of {self._folder}, and "
                f"{size(free)} are free: make room, or set `dam.teacher: live`."
            )

    def _keep(self, source: int, rows: Sequence[Row]) -> None:
        path = self._path(source, rows)
        if not is_sound(path):
            self._write(path, source, rows)
        self._files |= {(source, _key(row)): path for row in rows}

    def _write(self, path: Path, source: int, rows: Sequence[Row]) -> None:
        tensors = {}
        for some in together(rows, *self._at_once):
            # Copies: rows that were computed together share their storage.
            states = self._states(source, some)
            tensors |= {_key(r): s.clone().cpu() for r, s in zip(some, states, strict=True)}
        if not self._merged.has_head(source):
            raise DamError(
                "This model cannot be taken apart before its head, so its teachers' states cannot "
                "be kept: set `dam.teacher: live`."
            )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with whole(path) as partial:
                partial.write_bytes(save(tensors))  # `save_file`, killed, leaves a file of its own
        except OSError as error:
            raise DamError(
                f"The teachers' states cannot be kept in {self._folder} ({error}): make room and "
                "start again, which goes on from there, or set `dam.teacher: live`."
            ) from error

    @torch.no_grad()
    def _states(self, source: int, rows: Sequence[Row]) -> list[Tensor]:
        inputs = batch(rows, [source] * len(rows))
        ids, lengths, starts = (
            inputs[name].to(self._merged.device) for name in ("input_ids", "lengths", "starts")
        )
        (states,) = row_states(self._merged, ids, lengths, starts, [(source, range(len(ids)))])
        return states

    def _read(self, path: Path, key: str) -> Tensor:
        with safe_open(path, "pt") as file:
            return file.get_tensor(key)

    def _path(self, source: int, rows: Sequence[Row]) -> Path:
        digest = hashlib.sha256(f"{self._fingerprint} {source} {self._at_once}".encode())
        for row in rows:
            digest.update(_key(row).encode())
        return self._folder / f"{source}-{digest.hexdigest()[:24]}.safetensors"


def discard(folder: Path) -> None:
    """Remove what such fits have kept in a folder, and the folder if nothing else is in it."""
    for path in _files(folder):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if FILE.fullmatch(path.name)]


def bytes_of(rows: Iterable[Sequence[Row]], width: int, dtype: torch.dtype) -> int:
    """That the states of these rows take."""
    return sum(row.counted for own in rows for row in own) * width * dtype.itemsize


def rows_of_a_fit(rows: StepRows, settings: Settings, count: int) -> list[list[Row]]:
    """For each source the rows that the steps of so many processes will see, each once."""
    numbers: list[set[int]] = [set() for _ in rows.lengths]
    for item in items_of_a_fit(rows.lengths, settings, count):
        for own, number in zip(numbers, item, strict=True):
            own.add(number)
        if list(map(len, numbers)) == list(map(len, rows.lengths)):
            break  # later epochs have the same rows
    return [[rows.row(source, n) for n in sorted(own)] for source, own in enumerate(numbers)]


def _key(row: Row) -> str:
    return hashlib.sha256(f"{row.start} {row.ids}".encode()).hexdigest()[:24]
