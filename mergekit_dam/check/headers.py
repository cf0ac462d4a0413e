"""Shapes and sizes of the sources' tensors, from the headers of safetensors files alone."""

from collections.abc import Iterator
from math import prod
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

from mergekit_dam.fingerprint import read_header
from mergekit_dam.plan import Plan

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class HeaderShapes:
    """Of the tensors that a plan reads; other formats than safetensors tell nothing."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._models = {model: _headers(model) for model in plan.sources}

    def names(self) -> Iterator[str]:
        """Output tensors that some source has."""
        return (name for name in self._plan.tensors if self._entries(name) or self._unknown(name))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None where the merge changes it (aligned vocabularies, converted layouts)."""
        if self._is_aligned(name):
            return None
        shapes = {tuple(entry["shape"]) for entry in self._entries(name).values()}
        return shapes.pop() if len(shapes) == 1 else None

    def bytes(self) -> int:
        return sum(
            prod(entry["shape"]) * BYTES.get(entry["dtype"], 1)
            for name in self._plan.tensors
            for entry in self._entries(name).values()
        )

    def problems(self) -> Iterator[str]:
        for name, output in self._plan.tensors.items():
            entries = self._entries(name)
            shapes = {tuple(entry["shape"]) for entry in entries.values()}
            if len(shapes) > 1 and not self._is_aligned(name):
                remedy = "choose models of one architecture and size"
                if output.vocabulary_axis is not None:
                    remedy = "align the vocabularies, for example `tokenizer: {source: union}`"
                listed = ", ".join(f"{model} {e['shape']}" for model, e in entries.items())
                yield f"the sources' shapes of {name} differ ({listed}): {remedy}"
                return  # the other tensors differ for the same reason

    def _entries(self, name: str) -> dict[ModelReference, dict]:
        inputs = self._plan.tensors[name].inputs
        return {
            model: entry
            for model, headers in self._models.items()
            if headers is not None and model in inputs
            for entry in [next((headers[n] for n in inputs[model] if n in headers), None)]
            if entry is not None
        }

    def _unknown(self, name: str) -> bool:
        """No header tells (a `.bin` file, a converted layout), but the merge needs the tensor."""
        return not self._plan.tensors[name].optional

    def _is_aligned(self, name: str) -> bool:
        return self._plan.tensors[name].is_aligned


def _headers(model: ModelReference) -> dict[str, dict] | None:
    index = LoaderCache().get(model).index
    if not index.is_safetensors:
        return None
    result: dict[str, dict] = {}
    for shard in index.shards:
        path = Path(index.base_path) / shard.filename
        with path.open("rb") as file:
            result |= read_header(file, path)
    return result
