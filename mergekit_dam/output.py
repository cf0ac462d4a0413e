"""The folder that a merge is written to: what may stand there, and how it appears at once."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit.scripts.multimerge import MODEL_CHECK_FILENAMES

from mergekit_dam.errors import DamError
from mergekit_dam.places import hindrance, whole

MERGE_RECORD = "mergekit_config.yml"  # mergekit writes it into every merge of its own
INPUTS_RECORD = "mergekit_dam_inputs.json"  # of a step in a chain: what it was made of
# What a merge leaves: weights, configs, tokenizers, templates, its card and our coefficients.
WRITTEN_BY_MERGES = re.compile(
    r"(model|pytorch_model)[-\w]*\.(safetensors|bin)(\.index\.json)?|dam\.safetensors|README\.md|"
    r"mergekit_config\.yml|mergekit_dam_inputs\.json|[\w.]*(config|tokenizer|preprocessor|tokens|map|vocab|template)[\w.]*"
    r"\.(json|model|jinja)|merges\.txt|vocab\.txt|tokenizer\.model"
)


def require_free(out: str, *, overwrite: bool, inputs: Iterable[str]) -> None:
    """Refuse to merge over what is there. Called before the fit, which may take hours.

    Only a merge of mergekit's may be replaced, and never a folder in which an input lies: a
    model, its data, the config, the coefficients, or the working directory.
    """
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise DamError(f"{out} is a file: give the name of a new folder.")
    if reason := hindrance(path):
        raise DamError(f"{out} cannot be written, since {reason}: give another place.")
    target = path.resolve()
    for name in inputs:
        if target in (place := Path(name).expanduser().resolve(), *place.parents):
            raise DamError(f"{out} holds {name}, which the merge reads: give another folder.")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise DamError(f"{out} is not empty: give another folder, or --overwrite to replace it.")
    if not (path / MERGE_RECORD).exists():
        raise DamError(
            f"{out} is not a merge of mergekit's (it has no {MERGE_RECORD}), so it is not "
            "replaced: give another folder, or remove it yourself."
        )
    for file in sorted(path.iterdir()):
        if not WRITTEN_BY_MERGES.fullmatch(file.name):
            raise DamError(
                f"{out} holds {file.name}, which no merge has written: move it away, or give "
                "another folder."
            )


def is_merged(out: str) -> bool:
    """Whether `out` holds a model, as mergekit-multi sees it; ours appear only when whole."""
    folder = Path(out)
    return (folder / "config.json").exists() and any(
        (folder / name).exists() for name in MODEL_CHECK_FILENAMES
    )


@contextmanager
def appearing(out: str) -> Iterator[Path]:
    """A folder beside `out` that takes its place at the end, and is gone after a failure; what was
    there before is there still, or back.

    It has the name of `out`, after which mergekit calls the model in its card.
    """
    target = Path(out).resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(target)
        workplace = target.parent / f".{target.name}.partial-{os.getpid()}"
        workplace.mkdir()
    except OSError as error:
        raise DamError(f"{out} cannot be written ({error.strerror}): give another place.") from None
    try:
        fresh = workplace / target.name
        yield fresh
        if target.exists():
            os.replace(target, workplace / "replaced")
        os.replace(fresh, target)
    finally:
        _clear(workplace, target)


def _clear(workplace: Path, target: Path) -> None:
    """Should this be interrupted too, the earlier folder still is in the workplace."""
    replaced = workplace / "replaced"
    if replaced.exists() and not target.exists():
        os.replace(replaced, target)
    shutil.rmtree(workplace, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file that is whole or not there."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole(target) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DamError(
            f"{path} cannot be written ({error.strerror}): give another place."
        ) from None


def _remove_left_over(target: Path) -> None:
    """Half merges of processes that were killed; not those of processes still at work."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.partial-(\d+)")
    for path in target.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and not _is_alive(int(match.group(1))) and not (path / "replaced").exists():
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    return True
