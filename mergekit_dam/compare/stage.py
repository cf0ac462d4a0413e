"""The comparison, from a recipe to the folder of results."""

import os
import shlex
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from mergekit.options import MergeOptions
from torch import Tensor

import mergekit_dam
from mergekit_dam.check import check
from mergekit_dam.compare import records, tables
from mergekit_dam.compare.answers import load_answers
from mergekit_dam.compare.candidates import GRIDS, Candidate, Ingredients, ingredients
from mergekit_dam.compare.cost import metered
from mergekit_dam.compare.ground import Ground, Student, layers, rows_of_fits
from mergekit_dam.compare.in_memory import merge_in_memory
from mergekit_dam.compare.records import Entry, Results
from mergekit_dam.compare.search import Choice, best_of, configuration, evolve
from mergekit_dam.config import Recipe
from mergekit_dam.config.recipe import parse_document
from mergekit_dam.errors import DamError
from mergekit_dam.fit import fit, forget
from mergekit_dam.fit.alone import BusyError
from mergekit_dam.fit.device import choose_device, choose_threads
from mergekit_dam.fit.resume import digest, folder_of
from mergekit_dam.fit.rows import load_data
from mergekit_dam.output import write_text
from mergekit_dam.plan import plan_merge
from mergekit_dam.sources import describe

# Of the `dam:` block, what says on which ground to compare; the rest says how to fit.
GROUND_KEYS = ("data", "examples", "max_length", "held_out", "loss_on", "seed", "compute_dtype")
DAM, PAPER, CONFIG, EVOLUTION = "dam", "dam paper", "dam config", "evolution"
SEED = 0  # of random masks and of the evolution

Say = Callable[[str], None]


def compare(
    recipe: Recipe,
    out: str,
    options: MergeOptions,
    *,
    device: str = "auto",
    only: Collection[str] = (),
    again: Collection[str] = (),
    search_rows: int = 128,
    evaluations: int = 200,
    fits: Mapping[str, Mapping[str, Any]] | None = None,
    say: Say = print,
) -> Results:
    """Measure every model and every merge of a recipe; what is in `out` already is kept.

    `only` are names of merges; none: all of them. Those of `again` are computed anew, whatever
    `only` says. `fits` are further fits: a name and what its `dam:` block says beyond the data.
    Raises DamError for mistakes that concern the recipe; a merge that cannot be made is left out,
    with the reason in its place.
    """
    if Path(out).exists() and not Path(out).is_dir():
        raise DamError(f"{out} is a file: give the name of a folder.")
    coefficients = str(Path(out) / f"{_file_name(DAM)}.safetensors")
    check(
        recipe,
        options,
        coefficients=coefficients,
        will_fit=True,
        will_merge=False,
        device=device,
    )
    return _Comparison(
        recipe, Path(out), options, device, search_rows, evaluations, fits or {}, say
    ).run(only, again)


class _Comparison:
    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        options: MergeOptions,
        device: str,
        search_rows: int,
        evaluations: int,
        fits: Mapping[str, Mapping[str, Any]],
        say: Say,
    ):
        self._recipe, self._out, self._say = recipe, out, say
        self._options, self._device = options, choose_device(device)
        self._search_rows, self._evaluations = search_rows, evaluations
        self._plan = plan_merge(recipe.merge, options, recipe.settings.formula)
        choose_threads(self._plan.model_config, self._device, options.num_threads)
        self._rows_at = recipe.coefficients or str(self._out / "dam.safetensors")
        self._data = load_data(recipe, self._plan, self._rows_at, self._device)
        self._fit_data = rows_of_fits(self._data)
        document = yaml.safe_load(recipe.text)
        self._given: Ingredients = ingredients(document, self._plan)
        self._fits = {**self._standard_fits(document), **fits}
        self._results = self._begin(document)

    def run(self, only: Collection[str], again: Collection[str]) -> Results:
        names = [*GRIDS, EVOLUTION, *self._fits]
        if unknown := sorted({*only, *again} - set(names)):
            raise DamError(
                f"There is no merge {unknown[0]} to compare: choose of {', '.join(names)}."
            )
        if again:
            self._forget(again)
        names = [name for name in names if name in ({*only, *again} if only else names)]
        for name in names:  # before the ground is laid: a fit has the device to itself
            if name in self._fits and self._results.find(name) is None:
                self._fit(name)
        ground = Ground(
            self._recipe,
            self._plan,
            self._data,
            load_answers(self._recipe.settings, self._plan, self._data, self._rows_at),
            device=self._device,
            search_rows=self._search_rows,
        )
        self._models(ground)
        for name in names:
            if self._results.find(name) is None:
                self._add(self._merge(name, ground))
        tables.write(self._out, self._results, self._say)
        return self._results

    # --- The folder ---------------------------------------------------------------------------

    def _begin(self, document: dict) -> Results:
        """What an earlier run has left, if it was the same comparison."""
        fresh = Results(
            identity=self._identity(document),
            package=mergekit_dam.__version__,
            sources=tuple(map(str, self._plan.sources)),
        )
        found = records.read(self._out / records.RESULTS)
        if found is None:
            return fresh
        if found.identity != fresh.identity:
            raise DamError(
                f"{self._out} holds a comparison of other models, rows or settings: give another "
                "folder, or remove it."
            )
        return found

    def _identity(self, document: dict) -> str:
        models = (*self._plan.sources, self._plan.base)
        same = [
            document,
            [describe(model).model_dump() for model in models if model],
            [rows.digest() for rows in self._data],
            [self._search_rows, self._evaluations, self._device, self._fits],
            [mergekit_dam.__version__, *map(version, ("mergekit", "torch", "transformers"))],
        ]
        return digest(same)

    def _forget(self, names: Collection[str]) -> None:
        for name in names:
            forget(self._coefficients(name))
            self._cost_path(name).unlink(missing_ok=True)
        self._results = self._results.without(names)
        records.write(self._out / records.RESULTS, self._results)

    def _add(self, entry: Entry) -> None:
        self._results = self._results.with_entry(entry)
        records.write(self._out / records.RESULTS, self._results)
        self._say(tables.line(entry))

    # --- Entries ------------------------------------------------------------------------------

    def _models(self, ground: Ground) -> None:
        """The sources and the base, each on all rows."""
        students: dict[str, tuple[records.Kind, Callable[[], Student]]] = {
            str(source): ("source", lambda number=number: ground.source(number))
            for number, source in enumerate(self._plan.sources)
        }
        if self._plan.base is not None and str(self._plan.base) not in students:
            students[str(self._plan.base)] = ("base", ground.base)
        for name, (kind, student) in students.items():
            if self._results.find(name, kind) is None:
                self._add(_scored(Entry(name=name, kind=kind), lambda s=student: ground.score(s())))

    def _merge(self, name: str, ground: Ground) -> Entry:
        entry = Entry(name=name, kind="merge")
        try:
            if name in self._fits:
                choice, cost = self._fitted(name), records.read_cost(self._cost_path(name))
                tensors = self._tensors(choice)
            else:
                with metered(ground.layers, self._device) as meter:
                    choice = self._search(name, ground)
                    tensors = self._tensors(choice)
                cost = meter.cost + ground.cost_of_search if choice.tried > 1 else meter.cost
        except DamError as error:
            return entry.model_copy(update={"reason": error.message})
        entry = entry.model_copy(
            update={
                "cost": cost,
                "tried": choice.tried,
                "chosen": choice.best.chosen,
                "config": self._write_config(name, choice.best),
            }
        )
        return _scored(entry, lambda: ground.score(ground.merge(tensors)))

    def _tensors(self, choice: Choice) -> dict[str, Tensor]:
        return merge_in_memory(configuration(choice.best), self._plan, SEED)

    def _search(self, name: str, ground: Ground) -> Choice:
        if name == EVOLUTION:
            return evolve(self._given, ground, SEED, self._evaluations)
        return best_of(GRIDS[name](self._given), ground, SEED)

    def _write_config(self, name: str, candidate: Candidate) -> str:
        path = Path("configs") / f"{_file_name(name)}.yml"
        flags = [f"--random-seed={SEED}", *(["--cuda"] if "cuda" in self._options.device else [])]
        command = shlex.join(["mergekit-yaml", str(self._out / path), "OUT", *flags])
        head = f"# {command}\n# makes this merge (with the flags for models that were given).\n"
        body = yaml.safe_dump(candidate.document, sort_keys=False)
        write_text(self._out / path, head + body)
        return str(path)

    # --- Fits ---------------------------------------------------------------------------------

    def _standard_fits(self, document: dict) -> dict[str, dict[str, Any]]:
        own = {k: v for k, v in document["dam"].items() if k not in (*GROUND_KEYS, "report_to")}
        fits: dict[str, dict[str, Any]] = {PAPER: {"preset": "paper"}, DAM: {}}
        if own and own != {"preset": "paper"}:
            fits[CONFIG] = own
        return fits

    def _fit(self, name: str) -> None:
        """Writes the coefficients and, beside them, what they cost."""
        recipe, path = self._recipe_of(name), self._coefficients(name)
        goes_on = folder_of(path).exists()
        try:
            with metered(layers(self._plan), self._device) as meter:
                fit(recipe, path, self._options, device=self._device, resume=True,
                    data=self._fit_data)  # fmt: skip
        except BusyError:  # whose file is none of a fit that failed
            raise
        except DamError as error:
            self._add(Entry(name=name, kind="merge", reason=error.message))
            return
        if meter.cost.backward_passes or not self._cost_path(name).exists():
            cost = meter.cost.model_copy(update={"is_whole": not goes_on})
            write_text(self._cost_path(name), cost.model_dump_json())

    def _fitted(self, name: str) -> Choice:
        return Choice(Candidate({}, self._document_of(name)), 1)

    def _recipe_of(self, name: str) -> Recipe:
        document = self._document_of(name)
        return parse_document(self._recipe.path, document, yaml.safe_dump(document))

    def _document_of(self, name: str) -> dict[str, Any]:
        """The user's config with another `dam:` block; its own keeps the weights it starts from."""
        whole = yaml.safe_load(self._recipe.text)
        shared = {"coefficients": self._coefficients(name)}
        ground = {key: whole["dam"][key] for key in GROUND_KEYS if key in whole["dam"]}
        block = {**ground, **self._fits[name]}
        if name == CONFIG:
            parameters = {**(whole.get("parameters") or {}), **shared}
            return {**whole, "parameters": parameters, "dam": block}
        return {**self._given.write("dam", shared), "dam": block}

    def _coefficients(self, name: str) -> str:
        return os.path.join(self._out, f"{_file_name(name)}.safetensors")

    def _cost_path(self, name: str) -> Path:
        return self._out / f"{_file_name(name)}.cost.json"


def _file_name(name: str) -> str:
    return name.replace(" ", "_")


def _scored(entry: Entry, score: Callable[[], tuple[records.Scores, ...]]) -> Entry:
    try:
        return entry.model_copy(update={"scores": score()})
    except DamError as error:
        return entry.model_copy(update={"reason": error.message})
