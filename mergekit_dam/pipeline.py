"""The stages one after the other: check, fit, merge; for one merge or a chain of them."""

from collections.abc import Callable, Iterator, Mapping

from mergekit.options import MergeOptions

from mergekit_dam import report, table
from mergekit_dam.check import Outlook, check
from mergekit_dam.coefficients import open_file
from mergekit_dam.config import Recipe, Step, is_chain, read_chain, read_recipe
from mergekit_dam.config.recipe import read_documents
from mergekit_dam.errors import DamError
from mergekit_dam.fit import fit
from mergekit_dam.fit.processes import is_main, wait_for
from mergekit_dam.merging import inputs, merge
from mergekit_dam.output import is_merged, require_free
from mergekit_dam.steps import check_chain, label_of, made_of, stale, waits_for

Say = Callable[[str], None]


def fit_checked(
    recipe: Recipe, out: str | None, options: MergeOptions, *, device: str, resume: bool
) -> str:
    """Check, then fit into `out`, by default the recipe's own, and draw the report beside it.

    Returns the table of results, and where the report is.
    """
    out = out if out is not None else recipe.coefficients
    check(recipe, options, coefficients=out, will_fit=True, will_merge=False, device=device)
    results = table.as_text(fit(recipe, out, options, device=device, resume=resume))
    if options.quiet or not is_main():
        return results
    return f"{results}\n\n{_report(out)}"


def _report(coefficients: str) -> str:
    """Draw it where that is possible; a fit that is done does not fail over its report."""
    if not report.can_draw():
        return report.HOW_TO_DRAW
    page = report.page_beside(coefficients)
    try:
        report.write_page(open_file(coefficients), page)
    except Exception as error:
        return f"The report could not be drawn ({error}): the coefficients are whole."
    return f"The report is in {page}."


def merge_checked(recipe: Recipe, out: str, options: MergeOptions, *, overwrite: bool) -> None:
    """Check that the coefficients fit, then merge."""
    require_free(out, overwrite=overwrite, inputs=inputs(recipe))
    check(recipe, options, coefficients=recipe.coefficients, will_fit=False, will_merge=True)
    merge(recipe, out, options, overwrite=overwrite)


def run(
    config: str,
    out: str,
    options: MergeOptions,
    *,
    device: str,
    resume: bool,
    overwrite: bool,
    folder: str | None,
    say: Say,
) -> None:
    """Fit and merge a config file; `folder` keeps the intermediate models of a chain."""
    arguments = {"device": device, "resume": resume, "say": say}
    if not is_chain(config):
        _run(read_recipe(config), out, options, overwrite=overwrite, **arguments)
        return
    folder = folder or f"{out.rstrip('/')}.steps"
    steps = read_chain(config, folder)
    if all(step.name for step in steps):
        raise DamError(f"{config}: every merge has a `name`: the last one, for {out}, has none.")
    check_chain(config, steps, folder, options, device=device)  # before hours of work
    for step in steps:
        if step.name is None and is_main():
            require_free(out, overwrite=overwrite, inputs=inputs(step.recipe))
    for step in steps:
        if step.name is None:
            _run(step.recipe, out, options, overwrite=overwrite, **arguments)
        else:
            _run_step(step, f"{folder}/{step.name}", options, **arguments)


def check_file(
    config: str, options: MergeOptions, *, device: str, folder: str | None
) -> Iterator[tuple[str, Outlook | None]]:
    """Of a merge, or of each step of a chain: a title, and what is to come of it.

    Raises DamError with all mistakes.
    """
    if len(read_documents(config)) == 1:  # with a name, too
        recipe = read_recipe(config)
        arguments = {"coefficients": recipe.coefficients, "will_fit": True, "will_merge": True}
        outlook = check(recipe, options, **arguments, device=device, in_full=True)
        yield f"{config} is ready to fit.", outlook
        return
    folder = folder or f"{config}.steps"  # nothing is there, unless a folder is given
    steps = read_chain(config, folder)
    outlooks = check_chain(config, steps, folder, options, device=device, in_full=True)
    yield f"{config} is ready to run, step by step:\n", None
    for step in steps:
        label, waits = label_of(step), waits_for(step, folder)
        yield f"{label}, {'after ' + ', '.join(waits) if waits else 'ready'}", outlooks[label]


def _run_step(step: Step, out: str, options: MergeOptions, *, say: Say, **arguments) -> None:
    """An intermediate merge, unless it is there already. Processes of torchrun share its fit; then
    the first one merges, and the others wait, since the next step reads it."""
    if not is_merged(out):
        _run(
            step.recipe, out, options, overwrite=False, made_of=made_of(step), say=say, **arguments
        )
        wait_for(out, lambda: is_merged(out))
        return
    for problem in stale(step, out):  # an input that was not there when the chain was checked
        raise DamError(f"{step.recipe.path}: {problem}.")
    if is_main():
        say(f"{step.name} is in {out} already.")


def _run(
    recipe: Recipe,
    out: str,
    options: MergeOptions,
    *,
    device: str,
    resume: bool,
    overwrite: bool,
    say: Say,
    made_of: Mapping[str, str] | None = None,
) -> None:
    if is_main():  # which may have merged already when another process comes here
        require_free(out, overwrite=overwrite, inputs=inputs(recipe))
    results = ""
    if recipe.merge.merge_method == "dam":
        results = fit_checked(recipe, None, options, device=device, resume=resume) + "\n\n"
    if is_main():  # of a fit under torchrun
        merge(recipe, out, options, overwrite=overwrite, made_of=made_of)
        say(f"{results}The merged model is in {out}.")
