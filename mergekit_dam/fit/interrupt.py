"""Ctrl-C while a fit runs."""

import signal
import threading

from transformers import TrainerCallback


class Interrupt(TrainerCallback):
    """A context, and a callback of the Trainer within it, in which no Ctrl-C is lost.

    It ends a fit at once, as everywhere in Python, but for two cases: Python drops a
    KeyboardInterrupt that is raised in a finaliser or in the callback of a weak reference (then the
    fit ends after its step), and a file that is cut off by one can end in an error of its writer's
    instead (which becomes a KeyboardInterrupt again).
    """

    _came = False

    def __enter__(self) -> "Interrupt":
        is_main = threading.current_thread() is threading.main_thread()  # no other may set one
        self._is_ours = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._is_ours:
            signal.signal(signal.SIGINT, self._heed)
        return self

    def __exit__(self, *raised) -> None:
        if self._is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._raise_again()

    def on_step_end(self, args, state, control, **kwargs):
        self._raise_again()

    def _heed(self, number, frame):
        self._came = True
        signal.default_int_handler(number, frame)

    def _raise_again(self) -> None:
        if self._came:
            raise KeyboardInterrupt
