"""Which model on disk a mergekit model reference is, and which of a file's sources it is."""

import functools
import hashlib
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from mergekit_dam.coefficients import Source
from mergekit_dam.fingerprint import fingerprint


def describe(model: Any, *, teaches: bool = True) -> Source:
    """The identity of a mergekit `ModelReference`, as the coefficient file records it."""
    paths = local_paths(model)
    weights, config = _identity(paths, signature(paths))
    return Source(
        reference=str(model),
        revision=model.model.revision or _snapshot_revision(paths[0]),
        weights=weights,
        config=config,
        teaches=teaches,
    )


def match(sources: Sequence[Source], models: Sequence[Hashable]) -> list[int | None]:
    """The row of each model among a file's sources; None where a model is none of them.

    By reference with the same contents first; then by contents in order of position, wherever
    the model now lies. Models that are no checkpoints on disk (mergekit's in-memory API) have
    no contents to compare: they go by name, or by their number in the list of sources.
    """
    found = [describe(model) if hasattr(model, "model") else None for model in models]
    rows: list[int | None] = [
        _named(sources, model) if source is None else None
        for model, source in zip(models, found, strict=True)
    ]
    for by_reference in (True, False):
        for index, source in enumerate(found):
            if rows[index] is None and source is not None:
                rows[index] = next(
                    (
                        row
                        for row, candidate in enumerate(sources)
                        if row not in rows
                        and _same_contents(candidate, source)
                        and (not by_reference or candidate.reference == source.reference)
                    ),
                    None,
                )
    return rows


def _same_contents(recorded: Source, found: Source) -> bool:
    """A raw weights file (`mergekit-pytorch`) has no config to compare."""
    return recorded.weights == found.weights and found.config in (None, recorded.config)


def _named(sources: Sequence[Source], name: Hashable) -> int | None:
    references = [source.reference for source in sources]
    if name in references:
        return references.index(name)
    return name if isinstance(name, int) and name < len(sources) else None


def local_paths(model: Any) -> tuple[str, ...]:
    """The local folder of a model, and of its adapter; fetched by mergekit where needed."""
    from mergekit.common import ModelReference
    from mergekit.io.tasks import LoaderCache

    if os.path.exists(model.model.path):
        base = model.model.path
    elif model.lora is None:
        base = LoaderCache().get(model).index.base_path
    else:
        base = ModelReference(model=model.model).local_path(LoaderCache().hf_cache_dir)
    if model.lora is None:
        return (base,)
    return (base, adapter_path(model.lora.path, model.lora.revision))


def adapter_path(path: str, revision: str | None) -> str:
    """The local folder of an adapter, fetched from the Hub where needed."""
    if os.path.exists(path):
        return path
    from huggingface_hub import snapshot_download

    return snapshot_download(path, revision=revision)


def _snapshot_revision(path: str) -> str | None:
    """The commit of a model from the Hub, which its cache keeps as the folder's name."""
    folder = Path(path).resolve()
    return folder.name if folder.parent.name == "snapshots" else None


def signature(paths: Sequence[str]) -> tuple:
    """Changes when a file does, so that a remembered fingerprint is never a stale one."""
    entries = []
    for path in paths:
        files = [path] if os.path.isfile(path) else sorted(os.scandir(path), key=lambda f: f.name)
        for file in files:
            stat = os.stat(file)
            entries.append((os.fspath(file), stat.st_mtime_ns, stat.st_size))
    return tuple(entries)


def contents(files: Sequence[str]) -> str:
    """A digest of files, their paths and all that they hold, read again when one changes."""
    return _contents(tuple(files), signature(files))


@functools.lru_cache(maxsize=256)
def _contents(files: tuple[str, ...], _changes_with: tuple) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file} {os.path.getsize(file)} ".encode())
        with open(file, "rb") as opened:
            while part := opened.read(2**20):
                digest.update(part)
    return digest.hexdigest()


@functools.lru_cache(maxsize=256)
def _identity(paths: tuple[str, ...], _changes_with: tuple) -> tuple[str, str | None]:
    """An adapter's fingerprints are added to its model's."""
    weights, config = fingerprint(paths[0])
    for path in paths[1:]:
        adapter = fingerprint(path, is_adapter=True)
        weights, config = f"{weights}+{adapter[0]}", f"{config}+{adapter[1]}"
    return weights, config
