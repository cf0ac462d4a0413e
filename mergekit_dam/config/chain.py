"""Several merges in one file, as `mergekit-multi` takes them: documents with a `name`, which
other documents use as a model. The document without a name is the last merge."""

import graphlib
from dataclasses import dataclass, replace
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.scripts.multimerge import patched_config

from mergekit_dam.config.recipe import Recipe, parse_document, read_documents
from mergekit_dam.config.settings import Settings
from mergekit_dam.errors import DamError


@dataclass(frozen=True)
class Step:
    """One merge of a chain; its recipe names the folders of the merges that it uses."""

    name: str | None  # None: the last merge
    recipe: Recipe


def is_chain(path: str) -> bool:
    documents = read_documents(path)
    return len(documents) > 1 or "name" in documents[0][0]


def read_chain(path: str, folder: str) -> list[Step]:
    """The merges in an order in which each finds its inputs under `folder`.

    Raises DamError that names every mistake which can be known before the first merge.
    """
    recipes: dict[str | None, Recipe] = {}
    for document, text in read_documents(path):
        document = dict(document)
        name = document.pop("name", None)
        if name in recipes:
            what = f"the name {name}" if name else "no name (the last merge has none)"
            raise DamError(f"{path}: two merges have {what}: give each a name of its own.")
        recipes[name] = parse_document(path, document, text)
    _require_sound(path, recipes)
    patched = {name: _patched(recipe, set(recipes), folder) for name, recipe in recipes.items()}
    graph = {name: used for name, (_, used) in patched.items()}
    try:
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        circle = " -> ".join(map(str, error.args[1]))
        raise DamError(f"{path}: the merges use each other in a circle ({circle}).") from None
    return [Step(name, patched[name][0]) for name in order]


def _require_sound(path: str, recipes: dict[str | None, Recipe]) -> None:
    problems = []
    files: dict[str, str | None] = {}
    for name, recipe in recipes.items():
        where = f"merge {name}: " if name else "last merge: "
        problems += [where + problem for problem in recipe.problems]
        if recipe.merge.merge_method != "dam" or recipe.coefficients is None:
            continue
        if recipe.coefficients in files:
            other = files[recipe.coefficients] or "the last merge"
            problems.append(f"{where}`parameters.coefficients` is the file of {other}, too")
        files[recipe.coefficients] = name
    if problems:
        raise DamError(f"{path}: " + "; ".join(problems).rstrip(".") + ".")


def _patched(recipe: Recipe, names: set[str | None], folder: str) -> tuple[Recipe, set]:
    """mergekit's own replacement of names by folders, and the same in our block."""
    merge, used = patched_config(recipe.merge, names, folder)
    settings = recipe.settings and _patched_settings(recipe.settings, names, folder)
    return replace(recipe, merge=merge, settings=settings), used


def _patched_settings(settings: Settings, names: set[str | None], folder: str) -> Settings:
    data = []
    for entry in settings.data:
        model = ModelReference.parse(entry.source)
        if model.model.path in names:
            path = model.model.model_copy(update={"path": str(Path(folder) / model.model.path)})
            entry = entry.model_copy(
                update={"source": str(model.model_copy(update={"model": path}))}
            )
        data.append(entry)
    return settings.model_copy(update={"data": tuple(data)})
