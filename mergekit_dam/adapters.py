"""Adapters (`model+adapter`) merged into their models, in a cache that is neither half nor stale.

mergekit merges an adapter into a folder that is named after the two paths, and from then on takes
whatever lies in that folder: also what a killed merge has left there, and what was made of an
adapter, or of a base, that has changed since. Before mergekit looks, this module puts a whole and
current merge in that place, with a record of what it was made of.
"""

import binascii
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from mergekit_dam.errors import DamError, in_one_line
from mergekit_dam.fingerprint import is_whole, read_header, weight_files
from mergekit_dam.sources import adapter_path, describe, local_paths

RECORD = "mergekit_dam.json"  # in the merged folder: what it was made of
MODULE = re.compile(r"base_model\.model\.(.+)\.lora_A\.weight")  # PEFT's names in an adapter


def with_lora_cache(options: MergeOptions, models: Iterable[ModelReference]) -> MergeOptions:
    """The options with a folder of merged adapters that mergekit can take as it is.

    That is `--lora-merge-cache`, else `default_cache`. Adapters that are missing there, half
    written, or made of something else are merged (again). Raises DamError where one cannot be.
    """
    adapted = [model for model in dict.fromkeys(models) if model.lora is not None]
    if not adapted:
        return options
    cache = Path(options.lora_merge_cache or default_cache(adapted))
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DamError(
            f"The folder {cache} for merged adapters cannot be made ({error.strerror}): name "
            "another with --lora-merge-cache."
        ) from error
    options = options.model_copy(update={"lora_merge_cache": str(cache)})
    LoaderCache().setup(options)
    for model in adapted:
        _provide(model, options)
    return options


def default_cache(models: Iterable[ModelReference]) -> Path:
    """Beside the Hub's cache (`HF_HOME`), where gigabytes are expected; it may be deleted.

    mergekit tells models apart by their paths as written. Relative ones mean something else in
    every working directory, so each has a folder of its own.
    """
    root = Path(constants.HF_HOME) / "mergekit-dam" / "adapters"
    paths = [path.path for model in models for path in (model.model, model.lora)]
    if any(os.path.exists(path) and not os.path.isabs(path) for path in paths):
        return root / f"in_{binascii.crc32(os.getcwd().encode()):08x}"
    return root


def _provide(model: ModelReference, options: MergeOptions) -> None:
    """Leave a sound merge of `model` where mergekit looks for it."""
    record = _record(model, options)
    # mergekit's name for it, private there; ModelReference.merged says no name before it merges.
    name = f"{model.model._unique_id()}_{model.lora._unique_id()}"
    target = Path(options.lora_merge_cache) / name
    if _is_sound(target, record):
        return
    with WeakFileLock(target.with_name(f".{name}.lock")):  # the processes of one torchrun, say
        if not _is_sound(target, record):
            _require_fitting(model)
            _build(model, target, record, options)
    LoaderCache().loaders.pop(model, None)  # it may have what lay there before


def _record(model: ModelReference, options: MergeOptions) -> dict[str, Any]:
    """All that a merged adapter depends on."""
    _require_adapter(model)
    try:
        model.config(trust_remote_code=options.trust_remote_code)
        identity = describe(model)
    except DamError:
        raise
    except Exception as error:
        raise DamError(
            f"The model {model.model} under the adapter {model.lora} cannot be opened "
            f"({_reason(error)}): give the path of a folder with config.json and weights, or a "
            "name on the Hub."
        ) from error
    fingerprints = identity.model_dump(include={"weights", "config"})
    return {**fingerprints, "lora_merge_dtype": options.lora_merge_dtype}


def _require_adapter(model: ModelReference) -> None:
    try:
        folder = Path(adapter_path(model.lora.path, model.lora.revision))
        is_there = (folder / "adapter_config.json").exists()
        reason = "there is no adapter_config.json in it"
    except Exception as error:
        is_there, reason = False, _reason(error)
    if not is_there:
        raise DamError(
            f"The adapter {model.lora} of {model} cannot be opened ({reason}): give the path of a "
            "folder with adapter_config.json and adapter_model.safetensors, or a name on the Hub."
        )


def _is_sound(folder: Path, record: dict[str, Any]) -> bool:
    """Whether a merged adapter is whole and was made of what `record` says."""
    try:
        made_of = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        files = weight_files(folder)
        has_config = (folder / "config.json").exists()
        return made_of == record and has_config and all(map(is_whole, files))
    except (OSError, ValueError, DamError):
        return False


def _build(
    model: ModelReference, target: Path, record: dict[str, Any], options: MergeOptions
) -> None:
    """mergekit's own merge of the adapter, beside its place first, so that it appears whole."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # a killed process left it: the lock is ours
    try:
        partial.mkdir()
        with warnings.catch_warnings():
            # PEFT would go on with an adapter that lacks parts, as one of another base does.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            merged = model.merged(
                cache_dir=str(partial),
                trust_remote_code=options.trust_remote_code,
                lora_merge_dtype=options.lora_merge_dtype,
            )
        fresh = Path(merged.model.path)
        (fresh / RECORD).write_text(json.dumps(record), encoding="utf-8")
        if target.exists():
            os.replace(target, partial / "replaced")
        os.replace(fresh, target)
    except Exception as error:
        raise DamError(
            f"The adapter {model.lora} cannot be merged into {model.model} ({_reason(error)}): "
            "use the base on which it was trained, and see that there is room for the merged "
            f"model in {target.parent} (--lora-merge-cache names another folder)."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _require_fitting(model: ModelReference) -> None:
    """Refuse an adapter of another base by the headers alone, before any weight is loaded.

    PEFT drops parts for which the model has no layer in silence.
    """
    base, adapter = local_paths(model)
    misfit = _misfit(
        _shapes(weight_files(Path(base))),
        _shapes(weight_files(Path(adapter), is_adapter=True)),
    )
    replicates = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    if misfit and not replicates.get("layer_replication"):
        raise DamError(
            f"The adapter {model.lora} does not fit the model {model.model}: {misfit}. Use the "
            "base on which it was trained."
        )


def _misfit(base: dict[str, tuple[int, ...]], adapter: dict[str, tuple[int, ...]]) -> str | None:
    """What is wrong with the first part of an adapter that its base cannot take.

    Names that the base has nowhere in a like form tell nothing: transformers may rename them.
    """
    alike = {_without_numbers(name) for name in base}
    for name, down in adapter.items():
        module = MODULE.fullmatch(name)
        if module is None:
            continue
        weight = f"{module[1]}.weight"
        up = adapter.get(name.replace("lora_A", "lora_B"), ())
        if weight not in base:
            if _without_numbers(weight) in alike:
                return f"it is for {weight}, which the model does not have"
        elif len(down) == len(up) == len(base[weight]) == 2:
            made_for = (up[0], down[1])
            if sorted(made_for) != sorted(base[weight]):  # GPT-2's weights are [in, out]
                return f"{weight} is {list(base[weight])} and the adapter for {list(made_for)}"
    return None


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", name)


def _shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Of safetensors files; others are left to PEFT's own checks."""
    result = {}
    for path in files:
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                entries = read_header(file, path)
            result |= {name: tuple(entry["shape"]) for name, entry in entries.items()}
    return result


def _reason(error: Exception) -> str:
    text = in_one_line(error)
    return text if len(text) <= 300 else text[:300] + " …"
