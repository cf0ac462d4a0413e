"""How the numbers of a tensor are divided among the programs of a kernel."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

# Numbers that a program works on at once, of a merged weight and of a sum for each source; along
# the axis whose numbers lie side by side, so many of them. Of ten choices 1,024 side by side were
# the fastest on an H200; they spill registers on other GPUs, 512 do not.
MERGED, SUMMED, SIDE = 2048, 2048, 512


@dataclass(frozen=True)
class Layout:
    """A contiguous tensor as [stack, kept, summed] or [stack, summed, kept]: its coefficients
    differ along the stack and the kept axis."""

    stack: int
    kept: int
    summed: int
    is_side: bool  # whether the kept axis' numbers lie side by side, or the summed one's
    numbers: int  # in a tile
    is_expanded: bool = False  # to a coefficient for each number

    @property
    def side(self) -> int:
        return self.kept if self.is_side else self.summed

    @property
    def coefficients(self) -> int:
        return self.stack * self.kept

    @functools.cached_property
    def tile(self) -> tuple[int, int]:  # summed, kept
        if self.is_side and self.kept > 1:
            kept = min(SIDE if self.summed > 1 else self.numbers, power_of_2(self.kept))
            return min(self.numbers // kept, power_of_2(self.summed)), kept
        summed = min(SIDE if self.kept > 1 else self.numbers, power_of_2(self.summed))
        return summed, min(self.numbers // summed, power_of_2(self.kept))

    @functools.cached_property
    def tiles_kept(self) -> int:
        return -(-self.kept // self.tile[1])

    @functools.cached_property
    def tiles_summed(self) -> int:
        return -(-self.summed // self.tile[0])

    @property
    def tiles(self) -> int:
        return self.stack * self.tiles_kept * self.tiles_summed


def power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


@functools.cache
def layout_of(shape: tuple[int, ...], broadcast: tuple[int, ...], numbers: int) -> Layout:
    """Of a contiguous tensor of a shape S, with coefficients [*B]."""
    count = math.prod(shape)
    broadcast = padded(broadcast, shape)
    if all(size == 1 for size in broadcast):
        return Layout(1, 1, count, False, numbers)
    if len(shape) > 1 and broadcast[:-2] == tuple(shape[:-2]):
        rows, columns = shape[-2:]
        stack = math.prod(shape[:-2])
        if broadcast[-2:] == (1, columns):
            return Layout(stack, columns, rows, True, numbers)
        if broadcast[-2:] == (rows, 1):
            return Layout(stack, rows, columns, False, numbers)
    return Layout(1, count, 1, True, numbers, is_expanded=True)


def padded(broadcast: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    return (1,) * (len(shape) - len(broadcast)) + tuple(broadcast)


def expanded(coefficients: Tensor, layout: Layout, shape: Sequence[int]) -> Tensor:
    if not layout.is_expanded:
        return coefficients
    own = padded(coefficients.shape[1:], shape)
    return coefficients.reshape(len(coefficients), *own).expand(-1, *shape)
