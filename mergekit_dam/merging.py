"""The merge stage, by mergekit itself, into a folder that appears only when it is whole."""

import os
import shutil
import tempfile
from pathlib import Path

from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.multimerge import MODEL_CHECK_FILENAMES

from mergekit_dam import table
from mergekit_dam.adapters import with_lora_cache
from mergekit_dam.coefficients import open_file
from mergekit_dam.config import Recipe
from mergekit_dam.errors import DamError

COEFFICIENTS_NAME = "dam.safetensors"


def require_free(out: str, *, overwrite: bool) -> None:
    """Refuse to merge over what is there. Called before the fit, which may take hours."""
    path = Path(out)
    if path.is_file():
        raise DamError(f"{out} is a file: give the name of a new folder.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise DamError(f"{out} is not empty: give another folder, or --overwrite to replace it.")


def is_merged(out: str) -> bool:
    """Whether `out` holds a model, as mergekit-multi sees it; ours appear only when whole."""
    folder = Path(out)
    return (folder / "config.json").exists() and any(
        (folder / name).exists() for name in MODEL_CHECK_FILENAMES
    )


def merge(recipe: Recipe, out: str, options: MergeOptions, *, overwrite: bool = False) -> None:
    """mergekit's own merge of the recipe; the weights are those of `mergekit-yaml`.

    Written beside `out` first and renamed when complete, so that a killed merge leaves no half
    model. The results table goes into the card, the coefficients beside the weights.
    """
    require_free(out, overwrite=overwrite)
    options = with_lora_cache(options, recipe.merge.referenced_models())
    target = Path(out).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    workplace = tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent)
    try:
        fresh = Path(workplace) / target.name  # mergekit's card is named after the folder
        run_merge(recipe.merge, str(fresh), options=options, config_source=recipe.text)
        if recipe.merge.merge_method == "dam":
            _add_results(fresh, recipe.coefficients)
        if target.exists():
            os.replace(target, Path(workplace) / "replaced")
        os.replace(fresh, target)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def _add_results(folder: Path, coefficients: str) -> None:
    shutil.copyfile(coefficients, folder / COEFFICIENTS_NAME)
    header, card = open_file(coefficients).header, folder / "README.md"
    if card.exists() and header.results:
        with card.open("a", encoding="utf-8") as file:
            file.write("\n" + table.as_markdown(header))
