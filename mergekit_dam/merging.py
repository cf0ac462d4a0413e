"""The merge stage: mergekit's own merge, with what was learnt in its card."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from mergekit_dam import card
from mergekit_dam.adapters import with_lora_cache
from mergekit_dam.config import Recipe
from mergekit_dam.config.settings import STARTS
from mergekit_dam.errors import DamError
from mergekit_dam.hub import DEFAULT_NAME, local_file, open_coefficients
from mergekit_dam.output import INPUTS_RECORD, MERGE_RECORD, appearing, require_free


def inputs(recipe: Recipe) -> Iterator[str]:
    """Paths that the recipe reads, and the working directory."""
    yield os.getcwd()
    yield recipe.path
    if recipe.coefficients:
        yield recipe.coefficients
    for model in recipe.merge.referenced_models():
        yield from (part.path for part in (model.model, model.lora) if part is not None)
    if recipe.settings is not None:
        yield from (entry.path for entry in recipe.settings.data if entry.path)
        if recipe.settings.start not in (None, *STARTS):
            yield recipe.settings.start


def merge(
    recipe: Recipe,
    out: str,
    options: MergeOptions,
    *,
    overwrite: bool = False,
    made_of: Mapping[str, str] | None = None,
) -> None:
    """mergekit's own merge of the recipe; the weights are those of `mergekit-yaml`.

    The folder appears when it is complete, so that a killed merge leaves no half model. The
    results table goes into the card, the coefficients beside the weights, and so does `made_of`
    where it is given.
    """
    require_free(out, overwrite=overwrite, inputs=inputs(recipe))
    _require_device(options)
    options = with_lora_cache(options, recipe.merge.referenced_models())
    without_card = options.model_copy(update={"write_model_card": False})
    original = recipe.merge.model_copy(deep=True)  # planning rewrites it
    with appearing(out) as folder:
        run_merge(recipe.merge, str(folder), options=without_card)
        if options.write_model_card:
            _write_card(folder, recipe, original)
        if recipe.merge.merge_method == "dam":
            shutil.copyfile(local_file(recipe.coefficients), folder / DEFAULT_NAME)
        if made_of is not None:
            (folder / INPUTS_RECORD).write_text(json.dumps(made_of), encoding="utf-8")


def _require_device(options: MergeOptions) -> None:
    if (options.cuda or options.multi_gpu) and not torch.cuda.is_available():
        flag = "--multi-gpu" if options.multi_gpu else "--cuda"
        raise DamError(f"{flag}: torch sees no CUDA device here; merge without it, on the CPU.")


def _write_card(folder: Path, recipe: Recipe, merge: MergeConfiguration) -> None:
    is_dam = recipe.merge.merge_method == "dam"
    header = open_coefficients(recipe.coefficients).header if is_dam else None
    text = card.of_merge(merge, recipe.text, folder.name, header)
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / MERGE_RECORD).write_text(recipe.text, encoding="utf-8")
