"""The rows of all sources, over the merge's vocabulary."""

from pathlib import Path

from mergekit.common import ModelReference

from mergekit_dam.config import DataSettings, Recipe, Settings
from mergekit_dam.config.recipe import data_entries
from mergekit_dam.data import SourceData, load_rows
from mergekit_dam.errors import DamError
from mergekit_dam.fit.generate import Generation, write_if_missing
from mergekit_dam.opening import load_tokenizer
from mergekit_dam.plan import Plan


def load_data(recipe: Recipe, plan: Plan, out: str, device: str) -> list[SourceData]:
    """The rows of every source, in the sources' order. Those that a source is to write itself, on
    `device`, are kept beside the coefficient file `out`, and written last: a mistake in the
    others shall show before."""
    settings, data = recipe.settings, {}
    writing = {source: generation(source, settings, plan, out) for source in plan.teachers}
    for source in sorted(plan.teachers, key=lambda source: writing[source] is not None):
        if writing[source] is not None:
            write_if_missing(writing[source], recipe.merge, device)
        data[source] = load_source_data(source, settings, plan, out)
    return [data[source] for source in plan.teachers]


def generation(
    source: ModelReference, settings: Settings, plan: Plan, out: str
) -> Generation | None:
    """The rows that a source is to write itself, if it is."""
    entry = _entry(source, settings, plan)
    if entry.generate is None:
        return None
    found = Generation(source, entry, settings, plan, Path(f"{out}.data"))
    found.require_prompts()
    return found


def load_source_data(
    source: ModelReference, settings: Settings, plan: Plan, out: str
) -> SourceData:
    """Raises DamError for data that cannot be read, or do not fit the merge's vocabulary."""
    written = generation(source, settings, plan, out)
    data = written.load() if written else _read(source, settings, plan)
    _require_known(data, plan, source)
    return data


def _entry(source: ModelReference, settings: Settings, plan: Plan) -> DataSettings:
    entry = data_entries(settings, plan.teachers).get(source)
    if entry is None:
        raise DamError(f"`dam.data` has no entry for the source {source}: add one.")
    return entry


def _read(source: ModelReference, settings: Settings, plan: Plan) -> SourceData:
    # A model with learned positions has none beyond; the others were never trained there.
    limit = getattr(plan.model_config.get_text_config(), "max_position_embeddings", None)
    own = load_tokenizer(source, plan.options)
    return load_rows(_entry(source, settings, plan), settings, plan.tokenizer, own, limit)


def _require_known(data: SourceData, plan: Plan, source: ModelReference) -> None:
    """A token id beyond the embedding would read foreign memory."""
    size = plan.model_config.get_text_config().vocab_size
    highest = max(max(row.ids) for row in (*data.train, *data.held_out))
    if highest >= size:
        raise DamError(
            f"The data of {source} has the token id {highest}, but the merged model's vocabulary "
            f"has {size} tokens: give the merge a `tokenizer` that fits, for example "
            "`tokenizer: {source: union}`."
        )
