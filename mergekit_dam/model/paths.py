"""Several forward passes through one model that wait for each other at every block.

Each pass has a thread of its own, of which one runs at a time: a generator would do, could it be
carried through a model's own code. Whoever drives them sees the arguments with which every pass
arrives at a block, runs the block for each as often as it likes, and hands the outputs back. So
what a block needs is there once for all passes.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_dam.model.block import Block

# Whose weights a pass sees: a source's (its number), the merge's, the plain average's, or weights
# that are given: output tensor -> S.
View = int | Literal["merge", "average"] | Mapping[str, Tensor]


class _Stop(BaseException):
    """Ends a pass that nobody needs any longer."""


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
        self._arrived: SimpleQueue = SimpleQueue()
        self._outputs: SimpleQueue = SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(model,), daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._wait()

    def go_on(self, output: Any) -> None:
        """Hand back the output of the block and wait until the pass arrives at the next."""
        self._outputs.put(output)
        self._wait()

    def stop(self) -> None:
        if self._thread.is_alive():  # never before it has arrived somewhere
            self._outputs.put(_Stop())
            self._thread.join()

    def arrive(self, block: Block, args: tuple, kwargs: dict) -> Any:
        """Called in the thread of the pass, in place of a block."""
        self._arrived.put(Arrival(block, args, kwargs))
        output = self._outputs.get()
        if isinstance(output, _Stop):
            raise output
        return output

    def _wait(self) -> None:
        self.arrival = self._arrived.get()
        if isinstance(self.arrival, BaseException):
            raise self.arrival

    def _run(self, model: Callable[[Tensor], Any]) -> None:
        _current.path = self
        try:
            if self.input_ids.is_cuda:  # a thread begins with the first device
                torch.cuda.set_device(self.input_ids.device)
            with torch.set_grad_enabled(self._has_gradients):
                self.result = model(self.input_ids)
            self._arrived.put(None)
        except _Stop:
            pass
        except BaseException as error:  # whoever drives waits for something
            self._arrived.put(error)


_current = threading.local()


def arrive(block: Block, args: tuple, kwargs: dict) -> Any:
    """What a block's call is to be in the threads of the passes."""
    return _current.path.arrive(block, args, kwargs)


@contextmanager
def begun(paths: Sequence[Path]) -> Iterator[None]:
    """A context in which every path stands at a block, at first at its first."""
    try:
        for path in paths:
            path.start()
        yield
    finally:
        for path in paths:
            path.stop()


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
