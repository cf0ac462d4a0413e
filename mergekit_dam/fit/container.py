"""The memory that a container's limit leaves, which the machine's own figures do not tell."""

import math
from collections.abc import Iterator
from pathlib import Path

# Of control groups of either version: the limit, what is taken, and what of it are pages of files,
# which the kernel drops before it ends a process.
FILES = {
    2: ("memory.max", "memory.current", ("active_file", "inactive_file")),
    1: (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
}


def memory_left(root: Path = Path("/")) -> float:
    """Bytes within the limits of all groups that this process is in; infinite without any."""
    return min((_left(folder, version) for folder, version in _groups(root)), default=math.inf)


def _groups(root: Path) -> Iterator[tuple[Path, int]]:
    """Each group's folder and version, from the process' own up to that of all; in a container
    only some of them can be seen."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # another system
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        folder = top / group.lstrip("/")
        for place in (folder, *folder.parents):
            if place.is_relative_to(top):
                yield place, 1 if controllers else 2


def _left(folder: Path, version: int) -> float:
    most, taken, of_files = FILES[version]
    try:
        limit = int((folder / most).read_text())
        used = int((folder / taken).read_text())
        found = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        dropped = sum(int(count) for name, count in found if name in of_files)
    except (OSError, ValueError):  # no such group here, or `max`
        return math.inf
    return max(limit - used + dropped, 0)
