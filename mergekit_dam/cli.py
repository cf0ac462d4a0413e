"""The command line: `mergekit-dam fit | merge | run | check`.

Heavy imports happen inside the commands, so that `--help` is quick. Every command takes
mergekit-yaml's own flags.
"""

import functools
import logging
import traceback
from collections.abc import Callable

import click
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

import mergekit_dam
from mergekit_dam.errors import DamError

RESUME = click.option("--resume", is_flag=True, help="Go on with a fit that was interrupted.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace OUT where it is not empty.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mergekit_dam.__version__)
def main() -> None:
    """Differentiable Adaptive Merging for mergekit.

    Fit merge coefficients by distilling every source model into the merge, then merge with
    mergekit. CONFIG is mergekit's YAML with `merge_method: dam` and a `dam:` block.
    """


def _command(function: Callable) -> Callable:
    """A subcommand with mergekit's flags, whose errors are one sentence unless -v is given."""

    @functools.wraps(function)
    def wrapper(merge_options: MergeOptions, **arguments):
        _set_up_logging(merge_options)
        try:
            function(merge_options=merge_options, **arguments)
        except Exception as error:
            if merge_options.verbosity:
                traceback.print_exc()
            if isinstance(error, click.ClickException | click.exceptions.Exit | click.Abort):
                raise
            summary = " ".join(str(error).split()) or type(error).__name__
            raise DamError(f"{summary} ({type(error).__name__}; -v shows where).") from error

    return main.command(cls=PrettyPrintHelp)(add_merge_options(wrapper))


def _set_up_logging(options: MergeOptions) -> None:
    import transformers

    options.apply_global_options()
    if not options.verbosity:
        logging.getLogger().setLevel(logging.ERROR)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()


def _fit_device(options: MergeOptions) -> str:
    """mergekit merges on the CPU unless told; a fit takes a GPU where there is one."""
    source = click.get_current_context().get_parameter_source("device")
    given = source is not click.core.ParameterSource.DEFAULT or options.cuda
    return options.device if given else "auto"


@_command
@click.argument("config")
@click.option("--out", help="Coefficient file to write [default: parameters.coefficients].")
@RESUME
def fit(merge_options: MergeOptions, config: str, out: str | None, resume: bool) -> None:
    """Fit the coefficients of CONFIG and write the coefficient file."""
    from mergekit_dam.config import read_recipe

    recipe = read_recipe(config)
    table = _fit(recipe, out, merge_options, resume=resume)
    _say(merge_options, f"{table}\n\nThe coefficients are in {out or recipe.coefficients}.")


@_command
@click.argument("config")
@click.argument("out")
@OVERWRITE
def merge(merge_options: MergeOptions, config: str, out: str, overwrite: bool) -> None:
    """Merge CONFIG into OUT as mergekit-yaml does, with fitted coefficients."""
    from mergekit_dam.check import check
    from mergekit_dam.config import read_recipe
    from mergekit_dam.merging import merge as run

    recipe = read_recipe(config)
    check(recipe, merge_options, coefficients=recipe.coefficients, will_fit=False, will_merge=True)
    run(recipe, out, merge_options, overwrite=overwrite)


@_command
@click.argument("config")
@click.argument("out")
@RESUME
@OVERWRITE
@click.option(
    "--intermediate-dir",
    "-I",
    help="Where a chain of merges keeps its intermediate models [default: OUT.steps].",
)
def run(
    merge_options: MergeOptions,
    config: str,
    out: str,
    resume: bool,
    overwrite: bool,
    intermediate_dir: str | None,
) -> None:
    """Fit the coefficients of CONFIG, then merge into OUT, with the results in OUT's card.

    CONFIG may be a chain of merges as mergekit-multi takes it, in which `dam` and mergekit's own
    methods feed each other.
    """
    from mergekit_dam.config import is_chain, read_chain, read_recipe
    from mergekit_dam.merging import require_free

    require_free(out, overwrite=overwrite)
    if not is_chain(config):
        _run(read_recipe(config), out, merge_options, resume=resume, overwrite=overwrite)
        return
    folder = intermediate_dir or f"{out.rstrip('/')}.steps"
    steps = read_chain(config, folder)
    if all(step.name for step in steps):
        raise DamError(f"{config}: every merge has a `name`: the last one, for {out}, has none.")
    for step in steps:
        if step.name is None:
            _run(step.recipe, out, merge_options, resume=resume, overwrite=overwrite)
        else:
            _run_step(step, f"{folder}/{step.name}", merge_options, resume=resume)


def _run_step(step, out: str, options: MergeOptions, *, resume: bool) -> None:
    """An intermediate merge, unless it is there already."""
    from mergekit_dam.merging import is_merged

    if is_merged(out):
        _say(options, f"{step.name} is in {out} already.")
    else:
        _run(step.recipe, out, options, resume=resume, overwrite=False)


def _run(recipe, out: str, options: MergeOptions, *, resume: bool, overwrite: bool) -> None:
    from mergekit_dam.merging import merge as merge_stage

    table = None
    if recipe.merge.merge_method == "dam":
        table = _fit(recipe, None, options, resume=resume)
    merge_stage(recipe, out, options, overwrite=overwrite)
    _say(options, (f"{table}\n\n" if table else "") + f"The merged model is in {out}.")


@_command
@click.argument("config")
def check(merge_options: MergeOptions, config: str) -> None:
    """List the mistakes in CONFIG without loading weights, then what the fit will need."""
    from mergekit_dam.check import check as find_mistakes
    from mergekit_dam.config import read_recipe

    recipe = read_recipe(config)
    estimate = find_mistakes(
        recipe, merge_options, coefficients=recipe.coefficients, will_fit=True, will_merge=True
    )
    click.echo(f"{config} is ready to fit.\n{estimate}")


def _fit(recipe, out: str | None, options: MergeOptions, *, resume: bool) -> str:
    """Check, then fit; returns the table of results."""
    from mergekit_dam import table
    from mergekit_dam.check import check as find_mistakes
    from mergekit_dam.fit import fit as fit_stage

    out = out or recipe.coefficients
    find_mistakes(recipe, options, coefficients=out, will_fit=True, will_merge=False)
    header = fit_stage(recipe, out, options, device=_fit_device(options), resume=resume)
    return table.as_text(header)


def _say(options: MergeOptions, text: str) -> None:
    if not options.quiet:
        click.echo(f"\n{text}")


if __name__ == "__main__":
    main()
