"""Whose weights a pass sees, and how these are made."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from mergekit_dam.errors import DamError
from mergekit_dam.model.lookup import Lookup, is_shared
from mergekit_dam.model.mixture import Mixture
from mergekit_dam.model.weights import SourceWeights

# A source's (its number), those of several, each for its rows, the merge's, the plain average's,
# or weights that are given: output tensor -> S.
View = int | Mixture | Literal["merge", "average"] | Mapping[str, Tensor]


class Views:
    """The weights of each view, on the device and in the dtype of the forward pass."""

    def __init__(
        self,
        sources: SourceWeights,
        coefficients: Callable[[str], Tensor],  # output tensor -> [N, *B]
        dtype: torch.dtype,
    ):
        self._sources, self._coefficients, self._dtype = sources, coefficients, dtype
        self.device = torch.device("cpu")

    def weights(
        self, view: View, names: Sequence[str], tables: Collection[str] = ()
    ) -> Mapping[str, Tensor]:
        """Output tensors; of the merge's tables, and of one source's that would be copied, only the
        rows that a pass looks up."""
        is_copied = isinstance(view, int) and self._sources.is_copied(self._dtype)
        if view != "merge" and not is_copied:
            tables = ()
        made = self._whole(view, [name for name in names if name not in tables])
        return {**made, **{name: self._lookup(view, name) for name in tables}}

    def merged(self, names: Sequence[str], ids: Tensor | None = None) -> dict[str, Tensor]:
        """The merge's, or of each some rows, rounded as the merge will write them; the gradient
        passes through."""
        coefficients = [self._coefficients(name) for name in names]
        made = self._sources.merge(names, coefficients, self._dtype, ids)
        return dict(zip(names, made, strict=True))

    def _whole(self, view: View, names: Sequence[str]) -> Mapping[str, Tensor]:
        if view == "merge":
            return self.merged(names)
        if isinstance(view, int):
            return self._sources.of_source(view, names, self.device, self._dtype)
        if view == "average":
            return {name: self._sources.average(name, self._dtype) for name in names}
        return {name: _given(view, name).to(self.device, self._dtype) for name in names}

    def _lookup(self, view: View, name: str) -> Lookup:
        """A table of the merge, or of one source."""

        def make(ids: Tensor | None) -> Tensor:
            if view == "merge":
                return self.merged([name], ids)[name]
            return self._sources.of_one(view, name, ids).to(self.device, self._dtype)

        # Gradients of rows' own coefficients would be scattered, which a GPU adds up in any order.
        alone = view != "merge" or is_shared(self._coefficients(name).shape[1:])
        return Lookup(self._sources[name].shape, self._dtype, self.device, make, alone=alone)


def _given(weights: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        raise DamError(f"The merge has no tensor {name}, which its model needs.")
    return weights[name]
