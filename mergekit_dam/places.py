"""Where files can be written, and how they are replaced."""

import contextlib
import errno
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".*.partial-*"  # what a killed process may leave of `whole`
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # of a disk, a user
# The same in the words of safetensors, and of torch, which tells no number.
IN_WORDS = (*(f"(os error {number})" for number in NO_ROOM), "unexpected pos")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place for a file beside `path`, whose place it takes at the end, or is gone after a
    failure: at no moment is a half of it there."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def keep_earlier(path: Path) -> None:
    """Copy a file to a name of its own, before another takes its place: at no moment the path is
    without a file. A writer that was killed may have made the copy already."""
    for name in _earlier_names(path):
        if not name.exists():
            break
        if name.read_bytes() == path.read_bytes():
            return
    with whole(name) as copy:
        shutil.copy2(path, copy)


def _earlier_names(path: Path) -> Iterator[Path]:
    yield path.with_suffix(f".previous{path.suffix}")
    for number in itertools.count(2):
        yield path.with_suffix(f".previous-{number}{path.suffix}")


def tidy(path: Path) -> None:
    """Remove what killed writers of a file, and of its earlier copies, have left beside it; nobody
    may write it now."""
    stem, suffix = map(re.escape, (path.stem, path.suffix))
    pattern = re.compile(rf"\.{stem}(\.previous(-\d+)?)?{suffix}\.partial-\d+")
    for left in path.absolute().parent.glob(PARTIAL):
        if pattern.fullmatch(left.name):
            with contextlib.suppress(OSError):  # somebody else's
                left.unlink()


def free_disk(path: Path) -> int:
    """Bytes that are free where a file or folder is, or is to be."""
    return shutil.disk_usage(_there(path)).free


def tells_of_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, says that there is no room for a file."""
    while error is not None:
        if getattr(error, "errno", None) in NO_ROOM or any(w in str(error) for w in IN_WORDS):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def _there(path: Path) -> Path:
    """It, or the nearest of its parents that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def hindrance(path: Path) -> str:
    """Why a file or folder cannot be made at a path, of which parts may be missing; nothing where
    it can."""
    folder = _there(path.absolute().parent)
    if not folder.is_dir():
        return f"{folder} is a file"
    return "" if os.access(folder, os.W_OK) else f"{folder} is read-only"
