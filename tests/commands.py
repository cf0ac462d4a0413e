"""Runs the real command lines as subprocesses, as a user would."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(sys.executable).parent


def run(*command: object, succeeds: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """A command of this environment's; asserts that its exit status is as expected."""
    name, *arguments = map(str, command)
    result = subprocess.run(
        [str(SCRIPTS / name), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=240,
    )
    assert (result.returncode == 0) == succeeds, result.stdout + result.stderr
    return result


def refusal(*command: object, **environment: str) -> str:
    """The message of a command that must fail in one sentence, without a traceback."""
    result = run(*command, succeeds=False, **environment)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return result.stderr.partition("Error: ")[2].strip()
