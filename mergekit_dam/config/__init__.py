"""The user's YAML: mergekit's own keys and the `dam:` block."""

from mergekit_dam.config.recipe import Recipe, read_recipe
from mergekit_dam.config.settings import DataSettings, Settings

__all__ = ["DataSettings", "Recipe", "Settings", "read_recipe"]
