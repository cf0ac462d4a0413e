"""Reads the YAML that mergekit-yaml and mergekit-dam share."""

import math
import os
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_dam.config.data_settings import EVERY, DataSettings
from mergekit_dam.config.keys import BLOCK, unknown_key, unknown_keys
from mergekit_dam.config.settings import Settings
from mergekit_dam.errors import DamError, in_one_line

MOST_PARTS = 100_000  # of a YAML file: keys, values, lists
DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Recipe:
    """One YAML document."""

    path: str
    text: str
    merge: MergeConfiguration
    settings: Settings | None  # the `dam:` block; a merge alone needs none
    problems: tuple[str, ...]  # mistakes in keys and values, for `check` to name together

    @property
    def coefficients(self) -> str | None:
        value = (self.merge.parameters or {}).get("coefficients")
        return value if isinstance(value, str) else None

    @property
    def mergekit_part(self) -> dict[str, Any]:
        """mergekit's own keys, without the path of the coefficients."""
        fields = _plain(self.merge)
        fields.get("parameters", {}).pop("coefficients", None)
        return fields


def read_recipe(path: str) -> Recipe:
    """A file with one merge by dam.

    Raises DamError where it is no such file at all; lesser mistakes are collected.
    """
    documents = read_documents(path)
    if len(documents) > 1:
        raise DamError(
            f"{path} is a chain of {len(documents)} merges, which `mergekit-dam run` takes; this "
            "command takes one merge."
        )
    ((document, text),) = documents
    method = document.get("merge_method")
    if method != "dam":
        raise DamError(f"{path}: merge_method is {reprlib.repr(method)}: set it to `dam`.")
    return parse_document(path, document, text)


def read_documents(path: str) -> list[tuple[dict, str]]:
    """The YAML documents of a file, each with its text."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except OSError as error:
        raise DamError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DamError(f"{path} is not YAML: {in_one_line(error)}.") from None
    if _size(documents, {}) > MOST_PARTS:
        raise DamError(f"{path} is no merge config: its anchors make it endlessly large.")
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise DamError(f"{path} holds no merge config: it needs keys such as `merge_method`.")
    if len(documents) == 1:
        return [(documents[0], text)]
    return [(document, yaml.safe_dump(document, sort_keys=False)) for document in documents]


def _size(value: Any, known: dict[int, float]) -> float:
    """Parts of a document with its anchors written out; infinite where one holds itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf  # until all that is in it is counted
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(value)]


def parse_document(path: str, document: dict, text: str) -> Recipe:
    """Raises DamError where mergekit cannot read it; lesser mistakes are collected."""
    if isinstance(document.get("parameters"), dict):  # a key without a value is no setting
        kept = {k: v for k, v in document["parameters"].items() if v is not None}
        document = {**document, "parameters": kept}
    problems = [*unknown_keys(document), *_wrong_dtypes(document)]
    merge = _parse(MergeConfiguration, _without_block(document), "", problems)
    settings = None
    if BLOCK in document:
        settings = _parse_block(document[BLOCK] or {}, problems)
    if merge is None:
        raise DamError(f"{path}: " + "; ".join(problems) + ".")
    return Recipe(path, text, merge, settings, tuple(dict.fromkeys(problems)))


def _plain(value: Any) -> Any:
    """Of a part of mergekit's config, what YAML and JSON take. mergekit's own dump goes round in
    circles over a path with a space."""
    if isinstance(value, ModelReference) and value.override_architecture is None:
        return str(value)
    if isinstance(value, pydantic.BaseModel):
        return {name: _plain(v) for name, v in value if v != type(value).model_fields[name].default}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _without_block(document: Mapping) -> dict:
    return {key: value for key, value in document.items() if key != BLOCK}


def _parse(model: type, fields: Any, prefix: str, problems: list[str]) -> Any:
    try:
        return model.model_validate(fields)
    except pydantic.ValidationError as error:
        found: dict[tuple, str] = {}  # a union reports once for each of its members
        for problem in error.errors():
            place = _place(problem, fields)
            found.setdefault(place, _in_words(problem, place, model, prefix))
        problems.extend(found.values())
    except (RuntimeError, ValueError) as error:  # mergekit's own validators raise these
        problems.append(in_one_line(error))
    return None


def _parse_block(block: Any, problems: list[str]) -> Settings | None:
    """The `dam:` block; without its mistaken keys, if need be, so that `check` can go on to look
    for others. It is never fitted with mistakes."""
    settings = _parse(Settings, block, f"{BLOCK}.", problems)
    if settings is None and isinstance(block, Mapping):
        try:
            Settings.model_validate(block)
        except pydantic.ValidationError as error:
            wrong = {problem["loc"][0] for problem in error.errors() if problem["loc"]}
            sound = {key: value for key, value in block.items() if key not in wrong}
            settings = _parse(Settings, sound, f"{BLOCK}.", [])
    return settings


def _place(problem: Mapping, fields: Any) -> tuple:
    """Where the mistake is in the YAML: pydantic puts the names of types and the numbers of
    what it has made a list of between the keys."""
    place = ()
    for part in problem["loc"]:
        if part in _keys(fields):
            place, fields = (*place, part), fields[part]
    return (*place, problem["loc"][-1]) if problem["type"] == "missing" else place


def _keys(fields: Any) -> Collection:
    if isinstance(fields, Mapping):
        return fields.keys()
    return range(len(fields)) if isinstance(fields, list) else ()


def _in_words(problem: Mapping, place: tuple, model: type, prefix: str) -> str:
    where = (prefix + ".".join(map(str, place))).rstrip(".")
    if problem["type"] == "extra_forbidden":
        return unknown_key(where, _known_keys(model, place))
    if problem["type"] == "missing":
        return f"`{where}` is missing"
    message = problem["msg"].removeprefix("Value error, ").replace("tuple", "list")
    value = problem.get("input")
    it_is = "" if isinstance(value, Mapping) else f" (it is {reprlib.repr(value)})"
    return f"`{where}` {message}{it_is}"


def _known_keys(model: type, location: Iterable) -> Iterable[str]:
    """The fields at the place where an unknown key was found."""
    for part in list(location)[:-1]:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        model = next(
            (
                kind
                for kind in (annotation, *getattr(annotation, "__args__", ()))
                if hasattr(kind, "model_fields")
            ),
            model,
        )
    return model.model_fields


def _wrong_dtypes(document: Mapping) -> Iterator[str]:
    """mergekit reads these names only when it loads the first tensor."""
    for key in ("dtype", "out_dtype"):
        name = document.get(key)
        if name is not None and str(name).removeprefix("torch.") not in DTYPES:
            yield f"`{key}` is {reprlib.repr(name)}: choose one of {', '.join(DTYPES)}"


def parts_of(merge: MergeConfiguration) -> tuple[Any, ...]:
    """What may have `models`, `slices` and `parameters`: the merge, and each of its modules."""
    return (merge, *(merge.modules or {}).values())


def tokenizer_of(merge: MergeConfiguration) -> Any:
    """The YAML's `tokenizer` or `tokenizer_source`, as a coefficient file records it."""
    tokenizer = merge.tokenizer or merge.tokenizer_source
    if hasattr(tokenizer, "model_dump"):
        return tokenizer.model_dump(mode="json", exclude_none=True)
    return tokenizer


def data_entries(
    settings: Settings, models: Iterable[ModelReference]
) -> dict[ModelReference, DataSettings]:
    """Each source's entry of `dam.data`; sources without one are left out."""
    models = list(models)
    entries = {match_reference(entry.source, models): entry for entry in settings.data[::-1]}
    rest = next((entry for entry in settings.data if entry.source == EVERY), None)
    found = {model: entries.get(model, rest) for model in models}
    return {
        model: entry.model_copy(update={"source": str(model)})
        for model, entry in found.items()
        if entry is not None
    }


def match_reference(name: str, models: Iterable[ModelReference]) -> ModelReference | None:
    """The model that a string in the `dam:` block names, as mergekit parses references; `./math`,
    `math` and the same folder's absolute path are one."""
    try:
        wanted = _normal(ModelReference.parse(name))
    except (ValueError, RuntimeError):
        return None
    return next((model for model in models if _normal(model) == wanted), None)


def _normal(model: ModelReference) -> tuple[str | None, ...]:
    parts = (str(part) if part else None for part in (model.model, model.lora))
    return tuple(
        part and (os.path.abspath if os.path.exists(part) else os.path.normpath)(part)
        for part in parts
    )
