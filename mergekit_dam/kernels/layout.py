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
REMEMBERED = 1024  # divisions; of what is looked up there is one for each number of rows


@dataclass(frozen=True)
class Layout:
    """A contiguous tensor as [stack, kept, summed] or [stack, summed, kept]: its coefficients
    differ along the stack and the kept axis."""

    stack: int
    kept: int
    summed: int
    is_side: bool  # whether the kept axis' numbers lie side by side, or the summed one's
    tile: tuple[int, int]  # numbers of the summed and the kept axis that a program works on at once
    is_expanded: bool = False  # to a coefficient for each number

    @property
    def side(self) -> int:
        return self.kept if self.is_side else self.summed

    @property
    def coefficients(self) -> int:
        return self.stack * self.kept

    @property
    def numbers(self) -> int:
        return self.coefficients * self.summed

    @property
    def tiles_kept(self) -> int:
        return -(-self.kept // self.tile[1])

    @property
    def tiles_summed(self) -> int:
        return -(-self.summed // self.tile[0])

    @property
    def tiles(self) -> int:
        return self.stack * self.tiles_kept * self.tiles_summed


def power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


@functools.lru_cache(REMEMBERED)
def layout_of(shape: tuple[int, ...], broadcast: tuple[int, ...], numbers: int) -> Layout:
    """Of a contiguous tensor of a shape S, with coefficients [*B], in tiles of `numbers`."""
    stack, kept, summed, is_side, is_expanded = _axes(shape, padded(broadcast, shape))
    return Layout(stack, kept, summed, is_side, _tile(kept, summed, numbers, is_side), is_expanded)


def _axes(shape: tuple[int, ...], broadcast: tuple[int, ...]) -> tuple[int, int, int, bool, bool]:
    """Stack, kept and summed axis, whether the kept one is side by side, whether expanded."""
    count = math.prod(shape)
    if all(size == 1 for size in broadcast):
        return 1, 1, count, False, False
    if len(shape) > 1 and broadcast[:-2] == tuple(shape[:-2]):
        rows, columns = shape[-2:]
        stack = math.prod(shape[:-2])
        if broadcast[-2:] == (1, columns):
            return stack, columns, rows, True, False
        if broadcast[-2:] == (rows, 1):
            return stack, rows, columns, False, False
    return 1, count, 1, True, True


def _tile(kept: int, summed: int, numbers: int, is_side: bool) -> tuple[int, int]:
    if is_side and kept > 1:
        side = min(SIDE if summed > 1 else numbers, power_of_2(kept))
        return min(numbers // side, power_of_2(summed)), side
    side = min(SIDE if kept > 1 else numbers, power_of_2(summed))
    return side, min(numbers // side, power_of_2(kept))


def padded(broadcast: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    return (1,) * (len(shape) - len(broadcast)) + tuple(broadcast)


def expanded(coefficients: Tensor, layout: Layout, shape: Sequence[int]) -> Tensor:
    if not layout.is_expanded:
        return coefficients
    own = padded(coefficients.shape[1:], shape)
    return coefficients.reshape(len(coefficients), *own).expand(-1, *shape)
