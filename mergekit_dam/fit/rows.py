"""The rows of all sources, over the merge's vocabulary."""

from mergekit.common import ModelReference

from mergekit_dam.config import Settings
from mergekit_dam.config.recipe import data_entries
from mergekit_dam.data import SourceData, load_rows
from mergekit_dam.errors import DamError
from mergekit_dam.plan import Plan, load_tokenizer


def load_data(settings: Settings, plan: Plan) -> list[SourceData]:
    """The rows of every source, in the sources' order."""
    return [load_source_data(source, settings, plan) for source in plan.sources]


def load_source_data(source: ModelReference, settings: Settings, plan: Plan) -> SourceData:
    """Raises DamError for data that cannot be read, or do not fit the merge's vocabulary."""
    entry = data_entries(settings, plan.sources).get(source)
    if entry is None:
        raise DamError(f"`dam.data` has no entry for the source {source}: add one.")
    # A model with learned positions has none beyond; the others were never trained there.
    limit = getattr(plan.model_config.get_text_config(), "max_position_embeddings", None)
    own = load_tokenizer(source, plan.options)
    data = load_rows(entry, settings, plan.tokenizer, own, limit)
    _require_known(data, plan, source)
    return data


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
