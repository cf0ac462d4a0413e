"""One fit at a time writes a coefficient file: two would mix up their checkpoints."""

import contextlib
import errno
import logging
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.utils import WeakFileLock

from mergekit_dam.errors import DamError
from mergekit_dam.fit import processes
from mergekit_dam.fit.resume import unwritable

LOG = logging.getLogger(__name__)
PATIENCE = 0.2  # seconds in which a lock is tried a few times
WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)  # some network disks


class BusyError(DamError):
    """Another fit is under way."""


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A context in which no other fit writes the coefficient file whose fit's folder this is.

    The system lets go of the lock of a process that is killed. Raises BusyError where another fit
    has it, DamError where nothing can be written.
    """
    if not processes.is_main():  # which has it for all
        yield
        return
    lock = folder.with_name(f".{folder.name}.lock")
    made = [parent for parent in lock.parents if not parent.exists()]
    with contextlib.ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(lock, timeout=PATIENCE))
        except TimeoutError as error:
            raise BusyError(
                f"Another fit is writing {folder.with_suffix('')} now: wait for its end, or give "
                "this one's coefficient file another name."
            ) from error
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise unwritable(folder, error) from error
            LOG.warning("%s is on a disk without locks: let no other fit write it now.", folder)
        try:
            yield
        finally:
            _tidy(lock, made)


def _tidy(lock: Path, made: list[Path]) -> None:
    """Leave neither the lock nor empty folders that were made for it."""
    with contextlib.suppress(OSError):  # some systems remove no file that is open
        lock.unlink(missing_ok=True)
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()
