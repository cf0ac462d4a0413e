"""Where files can be written."""

import os
from pathlib import Path


def hindrance(path: Path) -> str:
    """Why a file or folder cannot be made at a path, of which parts may be missing; nothing where
    it can."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        return f"{folder} is a file"
    return "" if os.access(folder, os.W_OK) else f"{folder} is read-only"
