"""Stock mergekit's merge with `dam` against `linear` on the same models.

python -m tests.benchmarks.merge [--shape cpu|7b] [--sources 3] [--repeat 5]
"""

import tempfile
from pathlib import Path

import click
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_dam.config import read_recipe
from mergekit_dam.data import Row, SourceData
from mergekit_dam.fit import fit
from tests.benchmarks.fit_step import SHAPES, save
from tests.benchmarks.measuring import alternate, machine, peak_of, table

QUIET = MergeOptions(quiet=True, write_model_card=False)


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="cpu")
@click.option("--sources", default=3)
@click.option("--repeat", default=5)
def main(shape, sources, repeat) -> None:
    print(f"{machine('cpu')}; {sources} sources of shape {shape} in bfloat16")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = SHAPES[shape]
        models = [save(folder / f"m{n}", config, n, torch.bfloat16) for n in range(sources)]
        documents = {"linear": _linear(models), "dam": _dam(folder, models)}
        steps = {kind: _merge(folder / kind, own) for kind, own in documents.items()}
        peaks = {kind: peak_of(step, "cpu") for kind, step in steps.items()}
        print(table(alternate(steps, repeat, "cpu"), peaks, "linear"))


def _linear(models: list[Path]) -> dict:
    share = {"weight": 1 / len(models)}
    return {
        "merge_method": "linear",
        "models": [{"model": str(model), "parameters": share} for model in models],
        "dtype": "bfloat16",
    }


def _dam(folder: Path, models: list[Path]) -> dict:
    """With the coefficients that a fit of no steps writes."""
    document = {
        "merge_method": "dam",
        "models": [{"model": str(model)} for model in models],
        "parameters": {"coefficients": str(folder / "dam.safetensors")},
        "dtype": "bfloat16",
        "dam": {
            "data": [{"source": str(m), "path": "unused.txt"} for m in models],
            "start": "average",
            "steps": 0,
        },
    }
    (folder / "config.yml").write_text(yaml.safe_dump(document), encoding="utf-8")
    rows = [Row([1, 5, 6, 7])]
    fit(
        read_recipe(str(folder / "config.yml")),
        str(folder / "dam.safetensors"),
        QUIET,
        data=[SourceData(rows, rows) for _ in models],
    )
    return {key: value for key, value in document.items() if key != "dam"}


def _merge(out: Path, document: dict):
    def step() -> None:
        run_merge(MergeConfiguration.model_validate(document), str(out), options=QUIET)

    return step


if __name__ == "__main__":
    main()
