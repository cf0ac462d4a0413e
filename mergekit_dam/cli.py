"""The command line: `mergekit-dam fit | merge | run | check`.

Every command takes mergekit-yaml's own flags, and so imports mergekit; what only a fit needs is
imported inside the commands.
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
        except KeyboardInterrupt:
            click.echo(
                "Interrupted. A fit goes on from its last checkpoint with --resume.", err=True
            )
            raise SystemExit(130) from None
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
    from mergekit_dam.fit.trainer import is_main_process
    from mergekit_dam.pipeline import fit_checked

    recipe, device = read_recipe(config), _fit_device(merge_options)
    table = fit_checked(recipe, out, merge_options, device=device, resume=resume)
    if is_main_process():
        written = out if out is not None else recipe.coefficients
        _say(merge_options, f"{table}\n\nThe coefficients are in {written}.")


@_command
@click.argument("config")
@click.argument("out")
@OVERWRITE
def merge(merge_options: MergeOptions, config: str, out: str, overwrite: bool) -> None:
    """Merge CONFIG into OUT as mergekit-yaml does, with fitted coefficients."""
    from mergekit_dam.config import read_recipe
    from mergekit_dam.pipeline import merge_checked

    merge_checked(read_recipe(config), out, merge_options, overwrite=overwrite)


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
    from mergekit_dam import pipeline

    pipeline.run(
        config,
        out,
        merge_options,
        device=_fit_device(merge_options),
        resume=resume,
        overwrite=overwrite,
        folder=intermediate_dir,
        say=functools.partial(_say, merge_options),
    )


@_command
@click.argument("config")
def check(merge_options: MergeOptions, config: str) -> None:
    """List the mistakes in CONFIG without loading weights, then what the fit will need."""
    from mergekit_dam.check import check as find_mistakes
    from mergekit_dam.config import read_recipe

    recipe = read_recipe(config)
    estimate = find_mistakes(
        recipe,
        merge_options,
        coefficients=recipe.coefficients,
        will_fit=True,
        will_merge=True,
        device=_fit_device(merge_options),
        reads_data=True,
    )
    click.echo(f"{config} is ready to fit.\n{estimate}")


def _say(options: MergeOptions, text: str) -> None:
    if not options.quiet:
        click.echo(f"\n{text}")


if __name__ == "__main__":
    main()
