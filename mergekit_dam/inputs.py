"""What tensors of the merge are made of."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import Tensor


def rows_of(tensor: Tensor, ids: Tensor | None) -> Tensor:
    """A copy of some rows; by default all, as they are."""
    return tensor if ids is None else tensor.index_select(0, ids)


@dataclass(frozen=True)
class Inputs:
    """The tensors of one output tensor, each of shape S."""

    sources: tuple[Tensor, ...]  # of the sources that have this tensor
    base: Tensor | None  # of task vectors
    prepared: tuple[Tensor, ...] | None  # the D_i, where they are sparsified

    @property
    def parts(self) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """What the coefficients scale, and what is to be subtracted from it before."""
        return (self.sources, self.base) if self.prepared is None else (self.prepared, None)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        return Inputs(
            tuple(map(change, self.sources)),
            None if self.base is None else change(self.base),
            None if self.prepared is None else tuple(map(change, self.prepared)),
        )

    def looked_up(self, ids: Tensor | None) -> "Inputs":
        """Copies of some rows, of each tensor that the formula reads; by default all, as they
        are."""
        if ids is None:
            return self
        read = Inputs(self.parts[0], self.base, None).each(lambda tensor: rows_of(tensor, ids))
        return read if self.prepared is None else replace(read, prepared=read.sources)


class Together(tuple[Inputs, ...]):
    """Inputs of tensors that are needed together, and what has been found out about them."""

    def __new__(cls, inputs: Iterable[Inputs]) -> "Together":
        self = super().__new__(cls, inputs)
        self.known = {}
        return self
