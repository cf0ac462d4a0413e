"""Keys of the YAML that nobody reads.

mergekit passes over keys that it does not know; a misspelt one would silently change the merge.
"""

import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mergekit import merge_methods
from mergekit.config import (
    ConditionalParameter,
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.tokenizer.config import (
    ModelTokenEmbedding,
    TokenEmbeddingConfig,
    TokenizerConfig,
)

from mergekit_dam.nearest import did_you_mean

BLOCK = "dam"  # the part of the YAML that is ours


def unknown_key(where: str, known: Iterable[str]) -> str:
    """A sentence part about a key that nobody reads, with the nearest one that is read."""
    return f"`{where}` is not a key" + did_you_mean(where.rpartition(".")[2], known)


def unknown_keys(document: Mapping) -> Iterator[str]:
    """One sentence part for each such key in mergekit's part of a document."""
    method = document.get("merge_method")
    try:
        parameters = [p.name for p in merge_methods.get(method).spec.parameters]
    except (RuntimeError, TypeError):
        known = [m.spec.name for m in merge_methods.registered_methods()]
        hint = did_you_mean(method, known)
        yield f"`merge_method` is {reprlib.repr(method)}, which mergekit does not know{hint}"
        return
    yield from _Finder(parameters).document(document)


class _Finder:
    """Walks a document; `parameters` are those of its merge method."""

    def __init__(self, parameters: Iterable[str]):
        self._parameter_names = list(parameters)

    def document(self, document: Mapping) -> Iterator[str]:
        yield from _unknown(document, (*MergeConfiguration.model_fields, BLOCK, "name"), "")
        yield from self._parameters(document.get("parameters"), "parameters.")
        yield from self._tokenizer(document.get("tokenizer"))
        yield from self._inputs(document, "")
        for name, module in _items(document.get("modules")):
            where = f"modules.{name}."
            yield from self._item(module, OutputModuleDefinition, where)
            yield from self._inputs(module, where)

    def _tokenizer(self, tokenizer: Any) -> Iterator[str]:
        yield from _unknown(tokenizer, TokenizerConfig.model_fields, "tokenizer.")
        for token, embedding in _items(_get(tokenizer, "tokens")):
            where = f"tokenizer.tokens.{token}."
            yield from _unknown(embedding, TokenEmbeddingConfig.model_fields, where)
            source = _get(embedding, "source")
            if _get(source, "kind") == "model_token":
                yield from _unknown(source, ModelTokenEmbedding.model_fields, f"{where}source.")

    def _inputs(self, parent: Any, where: str) -> Iterator[str]:
        for index, model in enumerate(_list(_get(parent, "models"))):
            yield from self._item(model, InputModelDefinition, f"{where}models.{index}.")
        for index, piece in enumerate(_list(_get(parent, "slices"))):
            yield from self._item(piece, OutputSliceDefinition, f"{where}slices.{index}.")
            for number, source in enumerate(_list(_get(piece, "sources"))):
                place = f"{where}slices.{index}.sources.{number}."
                yield from self._item(source, InputSliceDefinition, place)

    def _item(self, item: Any, model: type, where: str) -> Iterator[str]:
        yield from _unknown(item, model.model_fields, where)
        yield from self._parameters(_get(item, "parameters"), where + "parameters.")

    def _parameters(self, parameters: Any, where: str) -> Iterator[str]:
        yield from _unknown(parameters, self._parameter_names, where)
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
