"""What launches a process, such as torchrun; nothing heavy is imported here, so that a command can
look at it from its first moment on."""

import functools
import os
import sys
import threading
import time


@functools.cache
def end_with_launcher() -> None:
    """From now on, a process of torchrun's ends when torchrun does. A launcher that is killed ends
    none of them: they would wait for each other in torch's own code, or write beside those that are
    started next."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=[os.getppid()], daemon=True).start()


def _watch(launcher: int, pause: float = 1.0) -> None:
    while os.getppid() == launcher:
        time.sleep(pause)
    sys.stderr.write("Error: What launched this process has ended, so it ends, too.\n")
    sys.stderr.flush()
    os._exit(1)  # in the midst of anything: files are replaced whole
