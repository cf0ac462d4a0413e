"""Runs the real command lines in processes of their own, as a user would."""

import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import mergekit_dam.check
import mergekit_dam.fit  # noqa: F401  before any fork

SCRIPTS = Path(sys.executable).parent


def run(*command: object, succeeds: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """A command of this environment's; asserts that its exit status is as expected.

    The process is forked from the tests', which have imported all that takes a command five
    seconds to import; with an environment of its own it is started afresh.
    """
    name, *arguments = map(str, command)
    is_fresh = environment or os.environ.get("MERGEKIT_DAM_GPU")  # see conftest.py
    result = _start(name, arguments, environment) if is_fresh else _fork(name, arguments)
    assert (result.returncode == 0) == succeeds, result.stdout + result.stderr
    return result


def refusal(*command: object, **environment: str) -> str:
    """The message of a command that must fail in one sentence, without a traceback."""
    result = run(*command, succeeds=False, **environment)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return result.stderr.partition("Error: ")[2].strip()


def kill_when(is_time: Callable[[], bool], *command: object) -> None:
    """Start a command and kill it, without any warning, at a moment of the test's choice."""
    name, *arguments = map(str, command)
    with open(os.devnull, "w") as nowhere:
        process, status = _forked(name, arguments, nowhere.fileno(), nowhere.fileno()), None
        try:
            while status is None and not is_time():
                time.sleep(0.01)
                ended, found = os.waitpid(process, os.WNOHANG)
                status = found if ended else None
        finally:
            if status is None:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)


def _start(name: str, arguments: list[str], environment: dict[str, str]):
    return subprocess.run(
        [str(SCRIPTS / name), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=240,
    )


def _fork(name: str, arguments: list[str]) -> subprocess.CompletedProcess:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        _, status = os.waitpid(_forked(name, arguments, out.fileno(), err.fileno()), 0)
        out.seek(0)
        err.seek(0)
        code = os.waitstatus_to_exitcode(status)
        return subprocess.CompletedProcess([name, *arguments], code, out.read(), err.read())


def _forked(name: str, arguments: list[str], out: int, err: int) -> int:
    (script,) = entry_points(group="console_scripts", name=Path(name).name)
    main = script.load()
    process = os.fork()
    if process == 0:
        gc.freeze()  # what the tests have loaded is no garbage of the command's
        os._exit(_main(main, [name, *arguments], out, err))
    return process


def _main(main, arguments: list[str], out: int, err: int) -> int:
    """In the forked process: what the console script would do."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = arguments
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code
