"""The one exception for mistakes that a user can mend."""

import click


class DamError(click.ClickException):
    """A user's mistake: one sentence that says what is wrong, where, and what to do.

    Being a ClickException, it ends mergekit's own command lines (which are click commands
    too) with `Error: <sentence>` and exit status 1, not with a traceback.
    """


class NotFiniteError(DamError):
    """Something became NaN or infinite, which may be the sources' fault."""


def in_one_line(error: BaseException) -> str:
    """What another library says of an error, for a sentence of ours."""
    return " ".join(str(error).split()) or type(error).__name__
