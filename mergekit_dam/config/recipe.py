"""Reads the YAML that mergekit-yaml and mergekit-dam share, and finds its mistakes.

mergekit ignores keys that it does not know; a misspelt one would silently change the merge.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import yaml
from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import (
    ConditionalParameter,
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.tokenizer.config import TokenizerConfig

from mergekit_dam.config.settings import Settings
from mergekit_dam.errors import DamError

BLOCK = "dam"
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


def read_recipe(path: str) -> Recipe:
    """Raises DamError where the file is no merge config at all; lesser mistakes are collected."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        document = yaml.safe_load(text)
    except OSError as error:
        raise DamError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DamError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(document, dict):
        raise DamError(f"{path} holds no merge config: it needs keys such as `merge_method`.")
    method = document.get("merge_method")
    if method != "dam":
        raise DamError(f"{path}: merge_method is {method!r}: set it to `dam`.")
    if isinstance(document.get("parameters"), dict):  # a key without a value is no setting
        kept = {k: v for k, v in document["parameters"].items() if v is not None}
        document = {**document, "parameters": kept}
    problems = [*_unknown_keys(document), *_wrong_dtypes(document)]
    merge = _parse(MergeConfiguration, _without_block(document), "", problems)
    settings = None
    if BLOCK in document:
        settings = _parse(Settings, document[BLOCK] or {}, f"{BLOCK}.", problems)
    if merge is None:
        raise DamError(f"{path}: " + "; ".join(problems) + ".")
    return Recipe(path, text, merge, settings, tuple(dict.fromkeys(problems)))


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
        problems.append(str(error))
    return None


def _place(problem: Mapping, fields: Any) -> tuple:
    """Where the mistake is in the YAML: pydantic goes on with the names of types."""
    place = ()
    for part in problem["loc"]:
        is_there = part in fields if isinstance(fields, Mapping) else isinstance(part, int)
        if not is_there and problem["type"] != "missing":
            break
        place = (*place, part)
        fields = fields[part] if is_there else None
    return place


def _in_words(problem: Mapping, place: tuple, model: type, prefix: str) -> str:
    where = (prefix + ".".join(map(str, place))).rstrip(".")
    if problem["type"] == "extra_forbidden":
        return unknown_key(where, _known_keys(model, place))
    if problem["type"] == "missing":
        return f"`{where}` is missing"
    message = problem["msg"].removeprefix("Value error, ").replace("tuple", "list")
    value = problem.get("input")
    return f"`{where}` {message}" + ("" if isinstance(value, Mapping) else f" (it is {value!r})")


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


def unknown_key(where: str, known: Iterable[str]) -> str:
    """A sentence part about a key that nobody reads, with the nearest one that is read."""
    nearest = difflib.get_close_matches(where.rpartition(".")[2], list(known), n=1, cutoff=0.5)
    return f"`{where}` is not a key" + (f", did you mean `{nearest[0]}`?" if nearest else "")


def _unknown_keys(document: Mapping) -> Iterator[str]:
    """Keys of mergekit's part that mergekit would pass over in silence."""
    yield from _unknown(document, (*MergeConfiguration.model_fields, BLOCK, "name"), "")
    yield from _unknown_parameters(document.get("parameters"), "parameters.")
    yield from _unknown(document.get("tokenizer"), TokenizerConfig.model_fields, "tokenizer.")
    yield from _unknown_inputs(document, "")
    for name, module in _items(document.get("modules")):
        where = f"modules.{name}."
        yield from _unknown(module, OutputModuleDefinition.model_fields, where)
        yield from _unknown_parameters(_get(module, "parameters"), where + "parameters.")
        yield from _unknown_inputs(module, where)


def _wrong_dtypes(document: Mapping) -> Iterator[str]:
    """mergekit reads these names only when it loads the first tensor."""
    for key in ("dtype", "out_dtype"):
        name = document.get(key)
        if name is not None and str(name).removeprefix("torch.") not in DTYPES:
            yield f"`{key}` is {name!r}: choose one of {', '.join(DTYPES)}"


def _unknown_inputs(parent: Any, where: str) -> Iterator[str]:
    for index, model in enumerate(_list(_get(parent, "models"))):
        yield from _unknown_input(model, InputModelDefinition, f"{where}models.{index}.")
    for index, piece in enumerate(_list(_get(parent, "slices"))):
        yield from _unknown_input(piece, OutputSliceDefinition, f"{where}slices.{index}.")
        for number, source in enumerate(_list(_get(piece, "sources"))):
            place = f"{where}slices.{index}.sources.{number}."
            yield from _unknown_input(source, InputSliceDefinition, place)


def _unknown_input(item: Any, model: type, where: str) -> Iterator[str]:
    yield from _unknown(item, model.model_fields, where)
    yield from _unknown_parameters(_get(item, "parameters"), where + "parameters.")


def _unknown_parameters(parameters: Any, where: str) -> Iterator[str]:
    known = [parameter.name for parameter in merge_methods.get("dam").spec.parameters]
    yield from _unknown(parameters, known, where)
    for name, value in _items(parameters):
        for index, item in enumerate(_list(value)):
            place = f"{where}{name}.{index}."
            yield from _unknown(item, ConditionalParameter.model_fields, place)


def _unknown(mapping: Any, known: Iterable[str], where: str) -> Iterator[str]:
    for key, _ in _items(mapping):
        if key not in known:
            yield unknown_key(f"{where}{key}", known)


def _items(value: Any) -> Iterable:
    return value.items() if isinstance(value, Mapping) else ()


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def match_reference(name: str, models: Iterable[ModelReference]) -> ModelReference | None:
    """The model that a string in the `dam:` block names, as mergekit parses references."""
    try:
        reference = ModelReference.parse(name)
    except (ValueError, RuntimeError):
        return None
    return next((model for model in models if model == reference), None)
