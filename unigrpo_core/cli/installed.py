"""What a verb has to say, on stderr, about the plugins it works with."""

from __future__ import annotations

import sys
from pathlib import Path

from unigrpo_core.catalog import Catalog
from unigrpo_core.errors import shown
from unigrpo_core.recipe import with_plugin_file


def warned(catalog: Catalog) -> Catalog:
    """The catalog, its warnings said."""
    for warning in catalog.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return catalog


class Catalogs:
    """What is there for each recipe: what is installed, and the plugin file beside it if any."""

    def __init__(self, installed: Catalog) -> None:
        self.installed = installed
        self.known: dict[Path, Catalog] = {}

    def of(self, recipe: Path) -> Catalog:
        """The catalog for a recipe file; a plugin file is run once, and said.

        Raises:
            PluginError: the plugin file cannot be read.
        """
        folder = recipe.parent.resolve()
        if folder not in self.known:
            self.known[folder] = with_plugin_file(self.installed, recipe)
            self._say(self.known[folder])
        return self.known[folder]

    def _say(self, joined: Catalog) -> None:
        if joined.file is None:
            return
        own = joined.components[len(self.installed.components) :]
        broken = joined.broken[len(self.installed.broken) :]
        names = [f"{item.kind.replace('_', ' ')} {item.name!r}" for item in own]
        what = [f"which provides {', '.join(names)}"] if names else []
        what += [f"which is broken: {item.reason}" for item in broken]
        print(f"uses {shown(joined.file.path)}, {' and '.join(what)}", file=sys.stderr)
