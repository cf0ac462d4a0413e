"""The commands on coefficient files: inspect, report, convert, blend, push.

A FILE is a path, or user/repo[@revision][/file] on the Hub.
"""

import os
from collections.abc import Sequence

import click
from mergekit.options import MergeOptions

from mergekit_dam.command import file_command, merge_command
from mergekit_dam.errors import DamError


@file_command
@click.argument("file", type=click.Path())
def inspect(file: str) -> None:
    """Show what FILE holds: its sources, and a row for each kind of tensor."""
    show(file)


def show(file: str) -> None:
    from mergekit_dam.hub import open_coefficients
    from mergekit_dam.inspection import as_text
    from mergekit_dam.summary import statistics

    opened = open_coefficients(file)
    click.echo(as_text(opened, statistics(opened)))


@file_command
@click.argument("file", type=click.Path())
@click.option("--html", help="Page to write [default: beside FILE, its name with .html].")
@click.option("--png", help="Folder for the plots as PNG files, light and dark.")
def report(file: str, html: str | None, png: str | None) -> None:
    """Write a page about FILE: its coefficients by layer and kind of tensor, the fit's results.

    Without matplotlib it prints what `inspect` prints.
    """
    from mergekit_dam import report as pages
    from mergekit_dam.hub import open_coefficients, parse

    if not pages.can_draw():
        show(file)
        click.echo(f"\n{pages.HOW_TO_DRAW}")
        return
    opened = open_coefficients(file)
    page = html or pages.page_beside(file if os.path.exists(file) else parse(file)[2])
    pages.write_page(opened, page, png)
    click.echo(f"The report is in {page}" + (f", its plots in {png}." if png else "."))


@merge_command
@click.argument("source", type=click.Path())
@click.argument("out", type=click.Path())
def convert(merge_options: MergeOptions, source: str, out: str) -> None:
    """Turn SOURCE, a coefficient file with one number for each tensor, into a mergekit config of
    `linear`; or SOURCE, a mergekit config, into a coefficient file."""
    from mergekit_dam.coefficients import save
    from mergekit_dam.convert import from_config, to_linear
    from mergekit_dam.hub import local_file, open_coefficients
    from mergekit_dam.output import write_text

    _require_new(out)
    if _is_yaml(local_file(source)):
        save(out, *from_config(source, merge_options))
        click.echo(
            f"The coefficients are in {out}: merge with `merge_method: dam` and "
            f"`parameters: {{coefficients: {out}}}` in the place of the method and its weights."
        )
    else:
        write_text(out, to_linear(open_coefficients(source)))
        click.echo(f"The config is in {out}: `mergekit-yaml {out} OUT` merges it.")


@file_command
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option("--out", required=True, help="Coefficient file to write.")
@click.option(
    "--weight",
    "weights",
    type=float,
    multiple=True,
    help="What a file's coefficients are multiplied by: once for each file, in their order "
    "[default: the mean].",
)
def blend(files: Sequence[str], out: str, weights: Sequence[float]) -> None:
    """Add up FILES that were fitted on the same sources, or scale a single one.

    With weights 0.7 and 0.3 the merge lies between those of two files; with one file and a weight
    of 1.1 every coefficient grows by a tenth.
    """
    from mergekit_dam.blend import blend as add_up
    from mergekit_dam.coefficients import save
    from mergekit_dam.hub import open_coefficients

    if weights and len(weights) != len(files):
        raise DamError(f"{len(weights)} weights for {len(files)} files: give one for each.")
    _require_new(out)
    weights = weights or [1 / len(files)] * len(files)
    save(out, *add_up([open_coefficients(file) for file in files], weights))
    click.echo(f"The coefficients are in {out}.")


def _is_yaml(path: str) -> bool:
    return os.path.splitext(path)[1] in (".yml", ".yaml")


def _require_new(out: str) -> None:
    if os.path.exists(out):
        raise DamError(f"{out} is there already: give another name, or remove it.")


@file_command
@click.argument("file", type=click.Path())
@click.argument("repo")
@click.option("--private", is_flag=True, help="Create REPO as a private repository.")
@click.option("--dry-run", is_flag=True, help="Show what would be published, and publish nothing.")
@click.option(
    "--name",
    "names",
    multiple=True,
    metavar="PATH=REPO",
    help="What a model that was a local path is called on the Hub; once for each.",
)
def push(file: str, repo: str, private: bool, dry_run: bool, names: Sequence[str]) -> None:
    """Publish FILE as REPO on the Hub, with a card from which anybody rebuilds the merge."""
    from mergekit_dam import card
    from mergekit_dam.hub import open_coefficients
    from mergekit_dam.push import staged, upload

    with staged(open_coefficients(file), repo, _pairs(names)) as (folder, header):
        for model in card.unpublished(header):
            click.echo(
                f"Others cannot rebuild this merge: {model} is a local path here, and "
                f"`--name {model}=user/model` gives its name on the Hub.",
                err=True,
            )
        if dry_run:
            click.echo((folder / "README.md").read_text(encoding="utf-8"))
            for path in sorted(folder.iterdir()):
                click.echo(f"{path.name}: {path.stat().st_size:,} bytes")
            click.echo(f"Nothing was published to {repo}.")
            return
        url = upload(folder, repo, private=private)
    click.echo(f"Published at {url}; in a config: `coefficients: {repo}`.")


def _pairs(names: Sequence[str]) -> dict[str, str]:
    for name in names:
        if "=" not in name:
            raise DamError(f"--name {name}: write the path, `=`, and the name on the Hub.")
    return dict(name.rsplit("=", 1) for name in names)


COMMANDS = (inspect, report, convert, blend, push)
