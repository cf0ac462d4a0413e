"""The coefficient file: one safetensors file, written by the fit and read by the merge.

A float32 tensor [N, *B] for each output tensor, under the output tensor's name, and one
metadata entry `mergekit_dam` that holds the `Header` as JSON. See docs/file-format.md.
"""

import functools
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mergekit_dam.errors import DamError
from mergekit_dam.formula import Formula
from mergekit_dam.places import keep_earlier, whole
from mergekit_dam.task_vectors import Preparation

FORMAT_VERSION = 1
METADATA_KEY = "mergekit_dam"
LONGEST_NAME = 500


def _require_printable(text: str) -> str:
    """It will stand in a terminal, where control characters do more than stand."""
    if not text.isprintable():
        raise ValueError("it holds control characters")
    return text


Text = Annotated[str, pydantic.AfterValidator(_require_printable)]


class Frozen(pydantic.BaseModel, frozen=True, extra="forbid"):
    """A record of the file's header."""


class Source(Frozen):
    """One source model, as it was when the coefficients were fitted."""

    reference: Text  # as in the YAML: a path or a Hub name, `model+adapter` for a LoRA
    revision: Text | None = None
    weights: Text  # fingerprint.fingerprint
    config: Text | None = None
    teaches: bool = True  # False: a base without data of its own, after all the others


class Figures(Frozen):
    """Means over the predicted tokens of one source's held-out rows."""

    tokens: int
    kl: float  # KL(source ‖ merge), nats a token, at temperature 1
    perplexity: float  # of the merge
    source_perplexity: float


class Point(Frozen):
    """Of the loss curve: the mean loss of the steps up to this one."""

    step: int
    loss: float


class HeldOut(Frozen):
    """Of the held-out curve: the KL of each source after this step; 0 is the start."""

    step: int
    kl: tuple[float, ...]


class Results(Frozen):
    """What a fit came to; one `Figures` for each source."""

    average: tuple[Figures, ...]  # the plain average of the sources
    fit: tuple[Figures, ...]
    history: tuple[Point, ...] = ()
    held_out: tuple[HeldOut, ...] = ()  # the start's, and on the way, with `evaluate_every`


def _kls(results: Results) -> Iterator[tuple[float, ...]]:
    return (point.kl for point in results.held_out)


class Header(Frozen):
    """The file's metadata."""

    version: int = FORMAT_VERSION
    package: Text  # the version of mergekit-dam that wrote the file
    formula: Formula
    granularity: Literal["column", "row", "tensor", "element", "mixed"]  # mixed: see settings
    sources: tuple[Source, ...]  # in the order of the coefficients' first axis
    base: Source | None = None
    preparation: Preparation | None = None  # of sparsified task vectors
    tokenizer: Any = None  # the YAML's `tokenizer` or `tokenizer_source`
    settings: dict[str, Any] = {}  # the fit's settings: the YAML's `dam:` block, resolved
    merge: dict[str, Any] = {}  # mergekit's part of the YAML, without `coefficients`
    origin: Text = "fit"  # or a sentence that tells of what else the file was made
    identity: str | None = None  # changes with whatever the fit depends on
    results: Results | None = None

    @property
    def teachers(self) -> tuple[Source, ...]:
        return tuple(source for source in self.sources if source.teaches)

    @pydantic.model_validator(mode="after")
    def _is_complete(self) -> "Header":
        if not self.sources:
            raise ValueError("it names no source")
        if not self.teachers:
            raise ValueError("no source teaches")
        if not all(source.teaches for source in self.sources[: len(self.teachers)]):
            raise ValueError("a source without data stands before those that have some")
        results = self.results
        for figures in (results.average, results.fit, *_kls(results)) if results else ():
            if len(figures) != len(self.teachers):
                raise ValueError("the results are not one for each source")
        if self.formula == "task_vectors" and self.base is None:
            raise ValueError("task vectors without a base")
        prepared = self.preparation
        if prepared and (self.formula != "task_vectors" or prepared.counts() - {len(self.sources)}):
            raise ValueError("the preparation is not of task vectors, one for each source")
        return self


def save(path: str | os.PathLike, coefficients: Mapping[str, Tensor], header: Header) -> None:
    """Write atomically; an earlier, different file is kept as `<stem>.previous.safetensors`,
    and further ones as `.previous-2` and so on.

    One metadata entry alone, because safetensors writes several in an arbitrary order and the
    same fit shall give the same bytes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in coefficients.items()
    }
    data = safetensors.torch.save(tensors, metadata={METADATA_KEY: header.model_dump_json()})
    with whole(path) as partial:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists() and path.read_bytes() != data:
            keep_earlier(path)


def short(text: Any) -> str:
    """What a file says of itself, for a message: it may be long, and hold anything."""
    shown = "".join(c if c.isprintable() else " " for c in str(text)[:200])
    return " ".join(shown.split())


class CoefficientFile:
    """Lazy reader; safe to use from several threads. Every refusal is a DamError."""

    def __init__(self, path: str | os.PathLike):
        self.path = str(path)
        self._lock = threading.Lock()
        if not os.path.isfile(path):
            raise DamError(
                f"The coefficient file {path} does not exist: "
                "`mergekit-dam fit CONFIG` writes it (see `parameters.coefficients`)."
            )
        try:
            self._file = safetensors.safe_open(self.path, framework="pt")
        except (safetensors.SafetensorError, OSError) as error:
            raise DamError(
                f"{path} is not a safetensors file ({short(error)}): fit it again or download it "
                "again."
            ) from None
        self.header = self._read_header(self._file.metadata() or {})
        self.names = frozenset(self._file.keys())
        for name in self.names:
            if not name.isprintable() or len(name) > LONGEST_NAME:
                raise DamError(
                    f"{path} holds a tensor with a name that no model has ({short(name)}): fit it "
                    "again or download it again."
                )
            if self.header.preparation and name not in self.header.preparation.tensors:
                raise DamError(f"{path} does not say how {name} was sparsified: fit it again.")

    def _read_header(self, metadata: Mapping[str, str]) -> Header:
        if METADATA_KEY not in metadata:
            raise DamError(
                f"{self.path} is a safetensors file but holds no merge coefficients: set "
                "`parameters.coefficients` to a file that `mergekit-dam fit` has written."
            )
        try:
            fields = pydantic.TypeAdapter(dict).validate_json(metadata[METADATA_KEY])
            version = fields.get("version")
            if version != FORMAT_VERSION:
                raise DamError(
                    f"{self.path} has format version {short(version)}; this mergekit-dam reads "
                    f"version {FORMAT_VERSION}: update mergekit-dam, or fit the file again."
                )
            return Header.model_validate(fields)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = short(".".join(map(str, first["loc"]))) or "the header"
            raise DamError(
                f"{self.path} has damaged metadata ({where}: {short(first['msg'])}): fit it again."
            ) from None

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        """[N, *B], from the file's header alone."""
        self._require(name)
        return tuple(self._file.get_slice(name).get_shape())

    def get(self, name: str) -> Tensor:
        """The coefficients [N, *B] of one output tensor, float32 on the CPU."""
        self._require(name)
        try:
            with self._lock:
                tensor = self._file.get_tensor(name)
        except Exception as error:  # whatever a header can lie about
            raise DamError(
                f"{self.path}: {name} cannot be read ({short(error)}): fit it "
                "again or download it again."
            ) from None
        if tensor.dtype != torch.float32:
            raise DamError(f"{self.path}: {name} is {tensor.dtype}, not float32: fit it again.")
        if tensor.ndim == 0 or len(tensor) != len(self.header.sources):
            raise DamError(
                f"{self.path}: {name} has shape {list(tensor.shape)}, which does not begin with "
                f"the number of sources, {len(self.header.sources)}: fit it again."
            )
        if not tensor.numel():
            raise DamError(f"{self.path}: {name} holds no numbers: fit it again.")
        if not torch.isfinite(tensor).all():
            raise DamError(
                f"{self.path}: {name} holds NaN or infinity: fit it again with a lower "
                "`dam.learning_rate`."
            )
        return tensor

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse coefficients that cannot scale an output tensor of `shape`."""
        factors = self.shape(name)[1:]
        fits = len(factors) == len(shape) and all(
            factor in (1, size) for factor, size in zip(factors, shape, strict=True)
        )
        if not fits:
            raise DamError(
                f"{self.path}: the coefficients of {name} have shape {list(factors)} for each "
                f"source, but the tensor has shape {list(shape)}: fit them for these models."
            )

    def _require(self, name: str) -> None:
        if name not in self.names:
            raise DamError(
                f"{self.path} has no coefficients for the tensor {name}: it was fitted for other "
                "models or another layout; fit it again with this config."
            )


def is_coefficient_file(path: str | os.PathLike) -> bool:
    """Whether a file is one of ours, of this version or another, whole or with damaged values."""
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return False


def open_file(path: str | os.PathLike) -> CoefficientFile:
    """The reader of a file, shared by all threads until the file changes."""
    if not os.path.isfile(path):
        return CoefficientFile(path)  # which says so
    stat = os.stat(path)
    return _open(str(path), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=8)
def _open(path: str, _modified: int, _size: int) -> CoefficientFile:
    return CoefficientFile(path)
