"""What is in a coefficient file, in numbers: by kind of tensor, by depth, by value."""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.coefficients import CoefficientFile

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
BINS = 60


@dataclass(frozen=True)
class TensorStatistics:
    """One output tensor's coefficients; lists have one entry for each source."""

    name: str
    shape: tuple[int, ...]  # B, of one source
    mean: tuple[float, ...]
    square: tuple[float, ...]  # mean of the squares
    magnitude: tuple[float, ...]  # mean of |c|
    low: float
    high: float

    @property
    def kind(self) -> str:
        """The name with `*` for the numbers of layers and experts."""
        return NUMBER.sub("*", self.name)

    @property
    def stack(self) -> str:
        """What stands before the number of the layer."""
        return NUMBER.split(self.name, maxsplit=1)[0]

    @property
    def layer(self) -> int | None:
        """The number of the layer; None for embeddings, the final norm and the head."""
        found = NUMBER.search(self.name)
        return int(found.group()) if found else None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Group:
    """Several tensors taken together; means and standard deviations are over all their
    coefficients, one for each source."""

    name: str
    count: int
    shapes: tuple[tuple[int, ...], ...]  # B, each once
    mean: tuple[float, ...]
    spread: tuple[float, ...]
    magnitude: tuple[float, ...]  # mean of |c|


def statistics(file: CoefficientFile) -> list[TensorStatistics]:
    """Of every tensor, in the order of layers; one tensor is in memory at a time."""
    return [_statistics(name, file.get(name)) for name in sorted(file.names, key=in_order)]


def _statistics(name: str, values: Tensor) -> TensorStatistics:  # [N, *B]
    flat = _flat(values).double()
    return TensorStatistics(
        name=name,
        shape=tuple(values.shape[1:]),
        mean=tuple(flat.mean(1).tolist()),
        square=tuple(flat.square().mean(1).tolist()),
        magnitude=tuple(flat.abs().mean(1).tolist()),
        low=flat.min().item(),
        high=flat.max().item(),
    )


def _flat(values: Tensor) -> Tensor:  # [N, *B] -> [N, size of B]; B may be ()
    return values.reshape(len(values), -1)


def in_order(name: str) -> list[tuple[int, int, str]]:
    """A sorting key: `layers.2` before `layers.10`."""
    parts = name.split(".")
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts]


def by_kind(tensors: list[TensorStatistics]) -> list[Group]:
    """One group for each kind of tensor, in the order of their first tensors."""
    return [_group(kind, members) for kind, members in _grouped(tensors, "kind").items()]


def by_layer(tensors: list[TensorStatistics]) -> dict[int, Group]:
    """One group for each layer, ascending; of the largest stack of layers where a model has
    several, such as a vision tower beside the language model."""
    stacks = _grouped([t for t in tensors if t.layer is not None], "stack")
    layers = _grouped(max(stacks.values(), key=len, default=[]), "layer")
    return {layer: _group(str(layer), layers[layer]) for layer in sorted(layers)}


def cells(tensors: list[TensorStatistics]) -> dict[tuple[str, int | None], Group]:
    """One group for each kind in each layer, experts together."""
    found: dict[tuple[str, int | None], list[TensorStatistics]] = {}
    for tensor in tensors:
        found.setdefault((tensor.kind, tensor.layer), []).append(tensor)
    return {key: _group(key[0], members) for key, members in found.items()}


def _grouped(tensors: list[TensorStatistics], key: str) -> dict:
    groups: dict = {}
    for tensor in tensors:
        groups.setdefault(getattr(tensor, key), []).append(tensor)
    return groups


def _group(name: str, members: list[TensorStatistics]) -> Group:
    sizes = torch.tensor([m.size for m in members], dtype=torch.float64).unsqueeze(1)

    def mean_of(field: str) -> Tensor:  # [N]
        values = torch.tensor([getattr(m, field) for m in members], dtype=torch.float64)
        return (values * sizes).sum(0) / sizes.sum()

    mean = mean_of("mean")
    return Group(
        name=name,
        count=len(members),
        shapes=tuple(dict.fromkeys(m.shape for m in members)),
        mean=tuple(mean.tolist()),
        spread=tuple((mean_of("square") - mean.square()).clamp_min(0).sqrt().tolist()),
        magnitude=tuple(mean_of("magnitude").tolist()),
    )


def histogram(
    file: CoefficientFile, tensors: list[TensorStatistics]
) -> tuple[list[float], list[list[float]]]:
    """(edges, one list of shares for each source). Shares add up to 1 over the bins.

    The outermost thousandth of a wide tail would flatten all else, so the edges are where the
    means and four spreads end; what lies beyond counts in the outer bins.
    """
    total = _group("all", tensors)
    pairs = list(zip(total.mean, total.spread, strict=True))
    low = max(min(t.low for t in tensors), min(m - 4 * s for m, s in pairs))
    high = min(max(t.high for t in tensors), max(m + 4 * s for m, s in pairs))
    if not low < high:
        low, high = low - 0.05, low + 0.05
    counts = torch.zeros(len(total.mean), BINS, dtype=torch.float64)
    for name in (t.name for t in tensors):
        for row, values in enumerate(_flat(file.get(name))):
            counts[row] += torch.histc(values.clamp(low, high), BINS, low, high).double()
    edges = torch.linspace(low, high, BINS + 1).tolist()
    return edges, (counts / counts.sum(1, keepdim=True)).tolist()


def shares(groups: dict[int, Group]) -> dict[int, tuple[float, ...]]:
    """Each source's part of the sum of mean |c| in each layer; the parts add up to 1."""
    return {
        layer: tuple(m / (sum(group.magnitude) or 1.0) for m in group.magnitude)
        for layer, group in groups.items()
    }
