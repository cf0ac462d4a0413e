"""Whether the coefficient file's path can be written, and holds nothing else."""

import os
from collections.abc import Iterator
from pathlib import Path

from mergekit_dam.coefficients import is_coefficient_file
from mergekit_dam.config import Recipe
from mergekit_dam.fit.resume import folder_of, foreign_problem, states_of
from mergekit_dam.hub import parse
from mergekit_dam.places import hindrance


def path_problems(recipe: Recipe, coefficients: str | None, *, will_fit: bool) -> Iterator[str]:
    given = (recipe.merge.parameters or {}).get("coefficients")
    if not coefficients and given in (None, ""):
        yield (
            "`parameters.coefficients` is missing: it is the path of the file that the fit "
            "writes and the merge reads"
        )
    elif not coefficients:
        yield f"`parameters.coefficients` is {given!r}, which is not the path of a file"
    elif coefficients.startswith("~"):
        yield f"{coefficients}: mergekit does not know `~`, write the path out"
    elif os.path.isdir(coefficients) or coefficients.endswith(("/", os.sep)):
        yield f"{coefficients} is a folder: the coefficients are one file, give its path"
    elif will_fit and parse(coefficients) and not coefficients.endswith(".safetensors"):
        yield (
            f"{coefficients} is the name of a repository on the Hub, and a fit writes a local "
            "file: end its name with .safetensors"
        )
    elif will_fit:
        yield from _writing_problems(Path(coefficients))
        start = (recipe.settings and recipe.settings.start) or ""
        if os.path.exists(start) and os.path.realpath(start) == os.path.realpath(coefficients):
            yield (
                f"`dam.start` is {start}, which the fit writes itself: give "
                "`parameters.coefficients` another path"
            )


def _writing_problems(path: Path) -> Iterator[str]:
    if path.exists() and not is_coefficient_file(path):
        yield (
            f"{path} is there and is no coefficient file, so the fit would overwrite something "
            "else: give `parameters.coefficients` another path"
        )
    if problem := foreign_problem(folder_of(path)):
        yield problem
    if (states := states_of(folder_of(path))).is_file():
        yield f"{states} is a file, where a fit may keep its teachers' states: move it away"
    if reason := hindrance(path):
        yield f"{path} cannot be written, since {reason}: give another path"
