"""The whole road from a recipe file to a typed recipe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from unigrpo_core.catalog import Catalog, Component, Disabled
from unigrpo_core.loading import PluginFile
from unigrpo_core.recipe.emit import leaves, lines
from unigrpo_core.recipe.plugins import narrow
from unigrpo_core.recipe.positions import KeyPath
from unigrpo_core.recipe.problems import Origin, Problem, RecipeError
from unigrpo_core.recipe.rules import broken_rules
from unigrpo_core.recipe.schema import Recipe, slots
from unigrpo_core.recipe.shipped import shipped_file, shipped_names
from unigrpo_core.recipe.source import SET, Node, dotted, read_tree
from unigrpo_core.recipe.validate import validate

ASIDE = ("title", "after")  # keys that change nothing of a run: what it starts from is in start


@dataclass(frozen=True)
class Resolved:
    """A recipe with everything filled in.

    Args:
        name: the stem of its file.
        recipe: typed.
        values: plain tables, arrays and scalars, defaults included; keys without a value absent.
        origins: where each value is stated, by dotted path.
        disabled: the distributions whose plugins were not there for it.
        file: the plugin file that was there for it.
    """

    name: str
    recipe: Recipe
    values: Mapping[str, Any]
    origins: Mapping[str, Origin | Literal["default", "--set"]]
    disabled: tuple[Disabled, ...] = ()
    file: PluginFile | None = None

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the values but for those in ASIDE, as hex."""
        counted = {key: value for key, value in self.values.items() if key not in ASIDE}
        text = json.dumps(counted, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def components(self) -> tuple[Component, ...]:
        """The components it uses, each once."""
        used: list[Component] = []
        for _, slot in slots(self.recipe):
            if slot.component not in used:
                used.append(slot.component)
        return tuple(used)

    def notes(self) -> list[str]:
        """What its components would have the user know, such as weights that are not there."""
        found = [
            f"{path} {slot.use}: {note}"
            for path, slot in slots(self.recipe)
            for note in slot.notes()
        ]
        if self.recipe.after and not self.recipe.start:
            found.append(
                f"after: it starts where a run of {self.recipe.after} ends, which `unigrpo ablate` "
                "makes first; `unigrpo run` needs its folder: --set start=FOLDER"
            )
        return found

    def lines(self) -> Iterator[tuple[str, str | None]]:
        """The lines of :meth:`to_toml`, each with the dotted path of the value it states."""
        for text, path in lines(self.values):
            yield text, None if path is None else dotted(path)

    def to_toml(self) -> str:
        """A recipe that stands alone and resolves to the same values."""
        return "".join(f"{text}\n" for text, _ in self.lines())


def load_recipe(path: str | Path, catalog: Catalog, overrides: Sequence[str] = ()) -> Resolved:
    """Reads, merges and checks a recipe; ``overrides`` are ``path=value`` texts laid on last.

    Raises:
        RecipeError: with every problem there is.
    """
    tree = read_tree(path, overrides)
    catalog, problems = narrow(tree, catalog)
    recipe, others = validate(tree, catalog)
    problems += others
    if recipe is not None:
        for rule in broken_rules(recipe):
            at = rule.path
            if rule.other is not None and _later(tree, rule.other, at, Path(path).absolute()):
                at = rule.other
            origin = tree.at(at)[0].origin
            problems.append(Problem(origin, dotted(at), rule.message, rule.plugin))
    if recipe is None or problems:
        raise RecipeError(problems)
    values = recipe.model_dump(mode="json", exclude_none=True)
    origins = {dotted(path): _origin(tree, path) for path, _ in leaves(values)}
    return Resolved(
        Path(path).stem, recipe, values, origins, disabled=catalog.disabled, file=catalog.file
    )


def difference(a: Resolved, b: Resolved) -> list[tuple[str, Any | None, Any | None]]:
    """The values in which two recipes differ, as (path, in a, in b), None where there is none; what
    is in ASIDE does not count. Empty exactly when their hashes agree."""
    ours, theirs = ({dotted(path): v for path, v in leaves(x.values)} for x in (a, b))
    return [
        (path, ours.get(path), theirs.get(path))
        for path in dict.fromkeys((*ours, *theirs))
        if path not in ASIDE and ours.get(path) != theirs.get(path)
    ]


def _later(tree: Node, one: KeyPath, two: KeyPath, file: Path) -> bool:
    """Whether key ``one`` is stated in a later layer than ``two``: by --set, or in the file itself
    and not in one that it extends."""

    def layer(path: KeyPath) -> int:
        node, found = tree.at(path)
        if found != path:
            return 0
        return 3 if node.origin == SET else 2 if node.origin.file == file else 1

    return layer(one) > layer(two)


def _origin(tree: Node, path: KeyPath) -> Origin | Literal["default", "--set"]:
    node, found = tree.at(path)
    if found != path:
        return "default"
    return "--set" if node.origin == SET else node.origin


def shipped_titles() -> dict[str, str]:
    """The title of each shipped recipe by its name; of one that cannot be read, why."""
    titles: dict[str, str] = {}
    for name in shipped_names():
        try:
            tree = read_tree(shipped_file(name)).plain()
            titles[name] = str(tree.get("title", ""))
        except RecipeError as error:
            titles[name] = f"broken: {error.problems[0]}"
    return titles
