"""Several forward passes through one model that wait for each other at every block.

Each pass has a thread of its own, of which one runs at a time: a generator would do, could it be
carried through a model's own code. Whoever drives them sees the arguments with which every pass
arrives at a block, runs the block for each as often as it likes, and hands the outputs back.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from mergekit_dam.model import Block, MergedModel, View


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

    def __init__(self, model: Callable[[Tensor], Any], input_ids: Tensor, source: int, view: View):
        self.input_ids = input_ids  # [rows, length]
        self.source = source  # whose rows they are
        self.view = view
        self.arrival: Arrival | None = None  # None at the end
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
        if isinstance(self.arrival, Exception):
            raise self.arrival

    def _run(self, model: Callable[[Tensor], Any]) -> None:
        _current.path = self
        try:
            if self.input_ids.is_cuda:  # a thread begins with the first device
                torch.cuda.set_device(self.input_ids.device)
            with torch.no_grad():
                model(self.input_ids)
            self._arrived.put(None)
        except _Stop:
            pass
        except Exception as error:
            self._arrived.put(error)


_current = threading.local()


@contextmanager
def abreast(merged: MergedModel, paths: list[Path]) -> Iterator[None]:
    """A context in which all paths stand at the same block of the model, at first its first."""
    with merged.intercepted(lambda *call: _current.path.arrive(*call)):
        try:
            for path in paths:
                path.start()
            yield
        finally:
            for path in paths:
                path.stop()
