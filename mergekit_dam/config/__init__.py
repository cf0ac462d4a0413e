"""The user's YAML: mergekit's own keys and the `dam:` block."""

from mergekit_dam.config.chain import Step, is_chain, read_chain
from mergekit_dam.config.data_settings import DataSettings
from mergekit_dam.config.recipe import Recipe, parts_of, read_recipe, tokenizer_of
from mergekit_dam.config.settings import Settings

__all__ = [
    "DataSettings",
    "Recipe",
    "Settings",
    "Step",
    "is_chain",
    "parts_of",
    "read_chain",
    "read_recipe",
    "tokenizer_of",
]
