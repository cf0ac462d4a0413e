"""Several forward passes through one model that wait for each other at every block.

Each pass is a greenlet, a generator that can be left in the midst of a model's own code. Whoever
drives them sees the arguments with which every pass arrives at a block, runs the block for each as
often as it likes, and hands the outputs back. So what a block needs is there once for all passes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from mergekit_dam.model.block import Block
from mergekit_dam.model.views import View


@dataclass
class Arrival:
    """A block, and the arguments with which a pass calls it."""

    block: Block
    args: tuple
    kwargs: dict[str, Any]


class Path:
    """One forward pass of some rows, as the merge or as a source sees them."""

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        input_ids: Tensor,  # [rows, length]
        view: View,
        *,
        has_gradients: bool = False,
    ):
        self.input_ids, self.view, self._has_gradients = input_ids, view, has_gradients
        self.arrival: Arrival | None = None  # None at the end
        self.result: Any = None  # the model's, at the end
        self._pass = greenlet(model)

    def start(self) -> None:
        """Run to the first block."""
        self._pass.parent = getcurrent()  # who drives, and not who has made it
        self._run(self.input_ids)

    def go_on(self, output: Any) -> None:
        """Hand back the output of the block and run to the next."""
        self._run(output)

    def stop(self) -> None:
        while self._pass:  # has begun and not ended
            with torch.set_grad_enabled(self._has_gradients):
                self._pass.throw()

    def _run(self, value: Any) -> None:
        # Whether gradients are wanted is kept for a thread, of which all passes are part; a model
        # may have switched them off where it calls a block.
        with torch.set_grad_enabled(self._has_gradients):
            reached = self._pass.switch(value)
            self._has_gradients = torch.is_grad_enabled()
        if self._pass.dead:
            self.arrival, self.result = None, reached
        else:
            self.arrival = reached


def arrive(block: Block, args: tuple, kwargs: dict) -> Any:
    """What a block's call is to be in a pass."""
    return getcurrent().parent.switch(Arrival(block, args, kwargs))


@contextmanager
def begun(paths: Sequence[Path]) -> Iterator[None]:
    """A context in which every path stands at a block, at first at its first."""
    with ExitStack() as stack:
        for path in paths:
            stack.callback(path.stop)
            path.start()
        yield


# Outputs of a block for several calls (args and kwargs of each), as a view sees it.
Run = Callable[[Block, Sequence[tuple[tuple, dict]], View], Sequence[Any]]


def drive(paths: Sequence[Path], run: Run) -> None:
    """Bring all paths to their ends; at each block those that have the same view go together."""
    while waiting := [path for path in paths if path.arrival is not None]:
        block, together = waiting[0].arrival.block, defaultdict(list)
        for path in waiting:
            if path.arrival.block is block:
                view = path.view  # given weights cannot be a key
                together[id(view) if isinstance(view, Mapping) else view].append(path)
        for own in together.values():
            calls = [(path.arrival.args, path.arrival.kwargs) for path in own]
            for path, output in zip(own, run(block, calls, own[0].view), strict=True):
                path.go_on(output)
