"""The table ``[plugins]``: which distributions a recipe needs, and which it does without.

It is read before all other tables, since it decides what these can name.
"""

from __future__ import annotations

from collections.abc import Iterator

from unigrpo_core.catalog import Catalog, normal
from unigrpo_core.errors import did_you_mean
from unigrpo_core.recipe.positions import KeyPath
from unigrpo_core.recipe.problems import Problem
from unigrpo_core.recipe.source import Node, dotted


def narrow(tree: Node, catalog: Catalog) -> tuple[Catalog, list[Problem]]:
    """The catalog without what the recipe disables, and all that it requires and is not there.
    A value of another type is left to the check of types."""
    problems: list[Problem] = []
    for path, node in _texts(tree, "disable"):
        if normal(node.value) in catalog.installed():
            catalog = catalog.without(node.value, str(node.origin))
        else:
            hint = did_you_mean(node.value, _names(catalog))
            message = f"no distribution of plugins called {node.value!r} is installed{hint}"
            problems.append(Problem(node.origin, dotted(path), message, plugin=True))
    for path, node in _texts(tree, "require"):
        message, at_fault = _unmet(node.value, catalog)
        if message:
            problems.append(Problem(node.origin, dotted(path), message, at_fault))
    return catalog, problems


def _texts(tree: Node, key: str) -> Iterator[tuple[KeyPath, Node]]:
    array, path = tree.at(("plugins", key))
    if path == ("plugins", key) and isinstance(array.value, list):
        for place, node in enumerate(array.value):
            if isinstance(node.value, str):
                yield (*path, place), node


def _names(catalog: Catalog) -> list[str]:
    return sorted(name for name, _ in catalog.installed().values())


def _unmet(text: str, catalog: Catalog) -> tuple[str, bool]:
    """Why a requirement is not met ("" if it is), and whether a plugin is at fault for that."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.version import InvalidVersion, Version

    try:
        wanted = Requirement(text)
    except InvalidRequirement as error:
        reason = str(error).partition("\n")[0]
        return f'{text!r} is no requirement such as "name>=1.0": {reason}', False
    if wanted.extras or wanted.url or wanted.marker:
        return f"{text!r} should be a name and versions only, without extras, URL or marker", False
    key = normal(wanted.name)
    if key not in catalog.installed():
        hint = did_you_mean(wanted.name, _names(catalog))
        message = f"no distribution of plugins called {wanted.name!r} is installed{hint}"
        return message, True
    name, version = catalog.installed()[key]
    for disabled in catalog.disabled:
        if normal(disabled.distribution) == key:
            return f"{name} is required, and disabled by {disabled.by}", True
    for broken in catalog.broken:
        if normal(broken.distribution) == key:
            return f"{name} {version} is broken: plugin {broken.entry!r}: {broken.reason}", True
    try:
        met = wanted.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return f"needs {wanted}, and the version {version!r} of {name} is not of PEP 440", True
    return ("" if met else f"needs {wanted}, and {name} {version} is installed"), True
