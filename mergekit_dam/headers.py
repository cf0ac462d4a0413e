"""Shapes and sizes of the sources' tensors, from the headers of their files alone."""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from transformers import PretrainedConfig

from mergekit_dam.compatible import DEQUANTISE, differing_shapes
from mergekit_dam.differences import config_differences
from mergekit_dam.errors import DamError
from mergekit_dam.fingerprint import read_header
from mergekit_dam.plan import Plan

LAYER = re.compile(r"\.\d+\.")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
COPIED = {  # as buffers, and not merged
    "BOOL": torch.bool, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "C64": torch.complex64,
}  # fmt: skip
QUANTISED = ("F8", "F6", "F4", "torch.")  # the last in a `.bin`, of what has no code here
CODES = {dtype: code for code, dtype in (FLOATS | COPIED).items()}
# By a header's word for it, or the YAML's.
KINDS = FLOATS | {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}
BYTES = {word: dtype.itemsize for word, dtype in KINDS.items()}


class HeaderShapes:
    """Of the tensors that a plan reads."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._models = {model: _headers(model) for model in plan.sources}

    def names(self) -> Iterator[str]:
        """Output tensors that some source has."""
        teachers = set(self._plan.teachers)
        return (
            name
            for name in self._plan.tensors
            if teachers.intersection(self._entries(name)) or self._unknown(name)
        )

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None where the merge changes it (aligned vocabularies, converted layouts)."""
        shapes = {tuple(entry["shape"]) for entry in self._entries(name).values()}
        if self._is_aligned(name):
            is_cut = shapes and self._plan.vocabulary is None  # to the smallest vocabulary
            return tuple(map(min, zip(*shapes, strict=True))) if is_cut else None
        return shapes.pop() if len(shapes) == 1 else None

    def dtypes(self) -> set[torch.dtype]:
        """Of the merged tensors, as mergekit promotes their inputs; empty where no header tells."""
        models = {**self._models, **self._origin}
        found = set()
        for name, output in self._plan.tensors.items():
            kinds = {
                KINDS.get(self._plan.dtype or entry["dtype"])
                for entry in self._entries(name, models).values()
            }
            kinds = {kind for kind in kinds if kind}
            if output.out_dtype or kinds:
                found.add(output.out_dtype or functools.reduce(torch.promote_types, kinds))
        return found

    def bytes(
        self,
        shapes: Mapping[str, Sequence[int]],  # of output tensors for which a header may not tell
        *,
        base: bool,
        prepared: bool,
        only_made: bool,
    ) -> dict[str, int]:
        """Output tensor -> bytes of all sources' tensors for it, in the dtype that the YAML casts
        them to; with those of the `base` that is subtracted, and of the `prepared` differences.
        With `only_made`, of those that no file holds as they are."""
        models = {**self._models, **(self._origin if base else {})}
        result = {}
        for name, output in self._plan.tensors.items():
            entries, own = self._entries(name, models), 0
            for model in models.keys() & output.inputs.keys():
                shape, code = self._told(entries.get(model), model, shapes.get(name, ()))
                if not only_made or self._is_made(name, entries.get(model)):
                    own += prod(shape) * BYTES.get(self._plan.dtype or code, 1)
                own += 4 * prod(shape) if prepared and model in self._models else 0
            result[name] = own
        return result

    def _is_made(self, name: str, entry: dict | None) -> bool:
        """Whether mergekit makes a source's tensor of what its file holds."""
        cast = KINDS.get(self._plan.dtype or "")
        is_cast = cast and entry and KINDS.get(entry["dtype"]) != cast
        return entry is None or bool(is_cast) or self._is_aligned(name)

    def whole(self, model: ModelReference) -> int:
        """Bytes of all tensors of a source, in the dtype that the YAML casts them to."""
        return sum(
            prod(entry["shape"]) * BYTES.get(self._plan.dtype or entry["dtype"], 1)
            for entry in self._models[model].values()
        )

    @functools.cached_property
    def _origin(self) -> dict[ModelReference, dict[str, dict]]:
        """The base's headers, where it is no source."""
        base = self._plan.base
        return {base: _headers(base)} if base and base not in self._models else {}

    def _told(
        self, entry: dict | None, model: ModelReference, shape: Sequence[int]
    ) -> tuple[Sequence[int], str]:
        """Shape and dtype; of what is converted on loading, the merge's shape and the dtype of the
        model's other tensors."""
        if entry is not None:
            return entry["shape"], entry["dtype"]
        headers = self._models.get(model) or {"": {"dtype": ""}}
        return shape or (0,), next(iter(headers.values()))["dtype"]

    def problems(self) -> Iterator[str]:
        """What the headers tell of sources that do not fit together, the first of each sort."""
        if unfit := next(self._unfit(), None):  # what is quantised may have other shapes, too
            yield unfit
            return
        yield from itertools.islice(self._missing(), 1)
        yield from itertools.islice(self._differing(), 1)

    def _unfit(self) -> Iterator[str]:
        models = {**self._models, **self._origin}
        for name in self._plan.tensors:
            for model, entry in self._entries(name, models).items():
                if problem := _unfit(model, name, entry["dtype"]):
                    yield problem

    def _missing(self) -> Iterator[str]:
        for name, output in self._plan.tensors.items():
            found = self._entries(name)
            for model in () if output.optional else output.inputs:
                headers = self._models.get(model)
                if (
                    headers is not None
                    and model not in found
                    and not self._is_converted(model, name)
                ):
                    yield self._lacking(model, output.inputs[model][0], list(found))

    def _lacking(self, model: ModelReference, name: str, others: list[ModelReference]) -> str:
        """Why a source may lack a tensor: its config has another option; or mergekit describes
        another variant of the architecture."""
        trust = self._plan.options.trust_remote_code
        config = model.config(trust)
        if not others and self._is_in_range(name, config):
            return (
                f"no source has {name}, for which mergekit's description of "
                f"{config.architectures[0]} asks: mergekit cannot merge this variant of the "
                "architecture, unless the files are incomplete"
            )
        where = ""
        other = others[0].config(trust) if others else config
        if keys := config_differences(config, other, trust_remote_code=trust):
            where = f" ({others[0]} has it; their configs differ in {', '.join(keys[:3])})"
        return (
            f"{model} has no tensor {name}, which the merge needs{where}: choose models of one "
            "architecture with the same options, and layers that they have"
        )

    @staticmethod
    def _is_in_range(name: str, config: PretrainedConfig) -> bool:
        layer = LAYER.search(name)
        count = getattr(config.get_text_config(), "num_hidden_layers", None)
        return layer is None or count is None or int(layer.group().strip(".")) < count

    def _is_converted(self, model: ModelReference, name: str) -> bool:
        """Whether mergekit makes the tensor of others of its layer, such as a stack of experts."""
        model_type = model.config(self._plan.options.trust_remote_code).model_type
        layer = LAYER.search(name)
        keys = {
            key
            for key in self._models[model]
            if not LAYER.search(key) or (layer and layer.group() in key)
        }
        return name not in keys and can_convert_checkpoint_keys(model_type, keys, name)

    def _differing(self) -> Iterator[str]:
        for name, output in self._plan.tensors.items():
            if not self._is_aligned(name):
                shapes = {model: entry["shape"] for model, entry in self._entries(name).items()}
                if problem := differing_shapes(name, shapes, output.vocabulary_axis):
                    yield problem

    def _entries(
        self, name: str, models: dict[ModelReference, dict[str, dict]] | None = None
    ) -> dict[ModelReference, dict]:
        inputs = self._plan.tensors[name].inputs
        return {
            model: entry
            for model, headers in (models or self._models).items()
            if model in inputs
            for entry in [next((headers[n] for n in inputs[model] if n in headers), None)]
            if entry is not None
        }

    def _unknown(self, name: str) -> bool:
        """No header tells (a converted layout), but the merge needs the tensor."""
        return not self._plan.tensors[name].optional

    def _is_aligned(self, name: str) -> bool:
        return self._plan.tensors[name].is_aligned


def _unfit(model: ModelReference, name: str, code: str) -> str | None:
    """Why a tensor of this dtype is none to merge; buffers of integers, masks say, are copied."""
    if code in FLOATS or (code in COPIED and not name.endswith("weight")):
        return None
    if code not in COPIED and not code.startswith(QUANTISED):
        return (
            f"{model} holds {name} as {code}, which is no dtype of safetensors: download it again"
        )
    return (
        f"{model} holds {name} as {code}, and a merge needs floating-point numbers of at least 16 "
        f"bits: {DEQUANTISE}"
    )


def require_files(model: ModelReference) -> None:
    """Raises DamError for a model that is incomplete."""
    for path in _files(model):
        if not path.exists():
            raise DamError(f"{model} lacks the file {path}, which its index names: download it.")


def _files(model: ModelReference) -> list[Path]:
    index = LoaderCache().get(model).index
    return [Path(index.base_path) / shard.filename for shard in index.shards]


def _headers(model: ModelReference) -> dict[str, dict]:
    require_files(model)
    index = LoaderCache().get(model).index
    result: dict[str, dict] = {}
    for path in _files(model):
        if index.is_safetensors:
            with path.open("rb") as file:
                result |= read_header(file, path)
        else:
            result |= _archive_header(path)
    return result


def _archive_header(path: Path) -> dict[str, dict]:
    """The same of a `.bin` file: on the meta device its tensors are read without their values."""
    tensors = torch.load(path, map_location="meta", weights_only=True)
    tensors = tensors.get("state_dict", tensors)  # as mergekit reads it
    return {
        name: {"dtype": CODES.get(tensor.dtype, str(tensor.dtype)), "shape": list(tensor.shape)}
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor)
    }
