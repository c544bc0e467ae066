"""The plugin file beside a recipe: the user's own code beside the user's own recipe."""

from __future__ import annotations

from pathlib import Path

from unigrpo_core.catalog import Catalog
from unigrpo_core.loading import PLUGIN_FILE
from unigrpo_core.recipe import shipped


def with_plugin_file(catalog: Catalog, recipe: Path) -> Catalog:
    """The catalog with what ``unigrpo_plugins.py`` in the folder of a recipe file provides, if it
    is there. Folders of shipped recipes have none, whatever lies in them.

    Raises:
        PluginError: the file cannot be read.
    """
    folder = recipe.parent.resolve()
    file = folder / PLUGIN_FILE
    if folder.is_relative_to(shipped.shipped_recipes().resolve()) or not file.is_file():
        return catalog
    return catalog.with_file(file)
