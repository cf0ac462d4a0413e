"""What all subcommands have in common: mergekit's flags, and errors of one sentence."""

import functools
import logging
import traceback
from collections.abc import Callable
from typing import Any

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options
from tqdm import tqdm

from mergekit_dam.errors import DamError, in_one_line

INTERRUPTED = (
    "Interrupted. A fit goes on from its last checkpoint with --resume, a comparison when it is "
    "run again."
)


def merge_command(function: Callable) -> click.Command:
    """A subcommand with mergekit-yaml's own flags, as `merge_options`."""

    @functools.wraps(function)
    def wrapper(merge_options: MergeOptions, **arguments: Any) -> None:
        set_up_logging(merge_options)
        arguments["merge_options"] = merge_options
        in_one_sentence(function, merge_options.verbosity, arguments)

    return click.command(cls=PrettyPrintHelp)(add_merge_options(wrapper))


def file_command(function: Callable) -> click.Command:
    """A subcommand that reads and writes coefficient files, and no model."""

    @functools.wraps(function)
    def wrapper(verbosity: int, **arguments: Any) -> None:
        in_one_sentence(function, verbosity, arguments)

    verbose = click.option("-v", "verbosity", count=True, help="Show where an error came from.")
    return click.command(cls=PrettyPrintHelp)(verbose(wrapper))


def in_one_sentence(function: Callable, verbosity: int, arguments: dict[str, Any]) -> None:
    """Call a command; any error ends it in one sentence, after a traceback with -v."""
    try:
        function(**arguments)
    except KeyboardInterrupt:
        click.echo(INTERRUPTED, err=True)
        raise SystemExit(130) from None
    except Exception as error:
        _close_bars()
        if verbosity:
            traceback.print_exc()
        if isinstance(error, click.ClickException | click.exceptions.Exit | click.Abort):
            raise
        raise DamError(f"{in_one_line(error)} ({type(error).__name__}; -v shows where).") from error


def _close_bars() -> None:
    """Progress bars that an error has left open, so that it stands on a line of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def set_up_logging(options: MergeOptions) -> None:
    import transformers

    options.apply_global_options()
    ours = logging.getLogger("mergekit_dam")
    ours.handlers, ours.propagate = [_Warnings()], options.verbosity > 0
    ours.setLevel(logging.NOTSET if options.verbosity else logging.WARNING)
    if not options.verbosity:
        logging.getLogger().setLevel(logging.ERROR)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()


class _Warnings(logging.Handler):
    """Our own warnings, which are for the user, not for a log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"Warning: {record.getMessage()}", err=True)
