"""The command line: `mergekit-dam fit | merge | run | check | compare`, and the commands on files.

These take mergekit-yaml's own flags, and so import mergekit; what only a fit needs is
imported inside the commands.
"""

import functools

import click
from mergekit.options import MergeOptions

import mergekit_dam
from mergekit_dam import file_commands
from mergekit_dam.command import merge_command

RESUME = click.option("--resume", is_flag=True, help="Go on with a fit that was interrupted.")
INTERMEDIATE = click.option(
    "--intermediate-dir",
    "-I",
    help="Where a chain of merges keeps its intermediate models [default: OUT.steps; of a check "
    "CONFIG.steps].",
)
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace OUT where it is not empty.")


class _Group(click.Group):
    """Lists the commands in groups, as mergekit's help lists its options."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        on_files = {command.name for command in file_commands.COMMANDS}
        groups = {"Commands": [], "Commands on coefficient files": []}
        for name, command in self.commands.items():
            title = list(groups)[name in on_files]
            groups[title].append((name, command.get_short_help_str(formatter.width)))
        for title, rows in groups.items():
            with formatter.section(title):
                formatter.write_dl(rows)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mergekit_dam.__version__)
def main() -> None:
    """Differentiable Adaptive Merging for mergekit.

    Fit merge coefficients by distilling every source model into the merge, then merge with
    mergekit. CONFIG is mergekit's YAML with `merge_method: dam` and a `dam:` block.
    """


def _fit_device(options: MergeOptions) -> str:
    """mergekit merges on the CPU unless told; a fit takes a GPU where there is one."""
    source = click.get_current_context().get_parameter_source("device")
    given = source is not click.core.ParameterSource.DEFAULT or options.cuda
    return options.device if given else "auto"


@merge_command
@click.argument("config", type=click.Path())
@click.option("--out", help="Coefficient file to write [default: parameters.coefficients].")
@RESUME
def fit(merge_options: MergeOptions, config: str, out: str | None, resume: bool) -> None:
    """Fit the coefficients of CONFIG and write the coefficient file."""
    from mergekit_dam.config import read_recipe
    from mergekit_dam.fit.processes import is_main
    from mergekit_dam.pipeline import fit_checked

    recipe, device = read_recipe(config), _fit_device(merge_options)
    table = fit_checked(recipe, out, merge_options, device=device, resume=resume)
    if is_main():
        written = out if out is not None else recipe.coefficients
        _say(merge_options, f"{table}\n\nThe coefficients are in {written}.")


@merge_command
@click.argument("config", type=click.Path())
@click.argument("out", type=click.Path())
@OVERWRITE
def merge(merge_options: MergeOptions, config: str, out: str, overwrite: bool) -> None:
    """Merge CONFIG into OUT as mergekit-yaml does, with fitted coefficients."""
    from mergekit_dam.config import read_recipe
    from mergekit_dam.pipeline import merge_checked

    merge_checked(read_recipe(config), out, merge_options, overwrite=overwrite)


@merge_command
@click.argument("config", type=click.Path())
@click.argument("out", type=click.Path())
@RESUME
@OVERWRITE
@INTERMEDIATE
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


@merge_command
@click.argument("config", type=click.Path())
@INTERMEDIATE
def check(merge_options: MergeOptions, config: str, intermediate_dir: str | None) -> None:
    """List the mistakes in CONFIG without loading weights, then what the fit will need.

    Of a chain of merges, every step is checked as far as its inputs are there.
    """
    from mergekit_dam.pipeline import check_file

    device = _fit_device(merge_options)
    found = check_file(config, merge_options, device=device, folder=intermediate_dir)
    for title, outlook in found:
        click.echo(title if outlook is None else f"{title}\n{outlook}\n")


@merge_command
@click.argument("config")
@click.option("--out", required=True, help="Folder of the results; what is there is kept.")
@click.option("--only", help="Merges to compare, with commas between them [default: all].")
@click.option("--again", help="Merges to compute anew, with commas between them.")
@click.option(
    "--search-rows",
    default=128,
    show_default=True,
    type=click.IntRange(min=1),
    help="Fit rows of each source on which a method's parameters are chosen.",
)
@click.option(
    "--evaluations",
    default=200,
    show_default=True,
    type=click.IntRange(min=1),
    help="Merges that the evolutionary search tries.",
)
def compare(
    merge_options: MergeOptions,
    config: str,
    out: str,
    only: str | None,
    again: str | None,
    search_rows: int,
    evaluations: int,
) -> None:
    """Compare the merges of CONFIG's sources by all methods, on the same held-out rows.

    Every source, the base, mergekit's own methods with a small grid each, an evolutionary search,
    and `dam` by default, with the paper's preset and as CONFIG has it. Called again, it goes on
    where it was interrupted.
    """
    from mergekit_dam.compare import compare as run_comparison
    from mergekit_dam.config import read_recipe

    run_comparison(
        read_recipe(config),
        out,
        merge_options,
        device=_fit_device(merge_options),
        only=_names(only),
        again=_names(again),
        search_rows=search_rows,
        evaluations=evaluations,
        say=(lambda text: None) if merge_options.quiet else click.echo,
    )


def _names(given: str | None) -> list[str]:
    return [name.strip() for name in (given or "").split(",") if name.strip()]


for command in (check, fit, run, merge, compare, *file_commands.COMMANDS):
    main.add_command(command)


def _say(options: MergeOptions, text: str) -> None:
    if not options.quiet:
        click.echo(f"\n{text}")
