"""From a tree of values to the typed recipe, with every mistake at its file and line.

Tables are walked here and each is checked by its own pydantic class, so that one mistake hides no
other and plugins check their options themselves.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from unigrpo_core.catalog import Catalog, Component
from unigrpo_core.errors import PluginError, did_you_mean
from unigrpo_core.loading import said
from unigrpo_core.plugin import Options
from unigrpo_core.recipe.emit import inline
from unigrpo_core.recipe.positions import KeyPath
from unigrpo_core.recipe.problems import Problem
from unigrpo_core.recipe.schema import Recipe
from unigrpo_core.recipe.slots import Slot, Table
from unigrpo_core.recipe.source import SET, Node, dotted

T = TypeVar("T", bound=Table)


def validate(tree: Node, catalog: Catalog) -> tuple[Recipe | None, list[Problem]]:
    """The typed recipe, or None and all that is wrong with the tree."""
    reader = _Reader(catalog)
    recipe = reader.table(Recipe, tree, ())
    return (None if reader.problems else recipe), reader.problems


class _Reader:
    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.problems: list[Problem] = []

    def table(self, cls: type[T], node: Node, path: KeyPath) -> T | None:
        if not isinstance(node.value, dict):
            self.problem(node, path, f"should be a table, {_got(node)}")
            return None
        values: dict[str, Any] = {}
        for key, child in node.value.items():
            field = cls.model_fields.get(key)
            below = _table_of(field.annotation) if field else None
            if field is None or below is None:
                values[key] = _tuples(child.plain())
            elif get_origin(field.annotation) is tuple:
                values[key] = self.array(below, child, (*path, key))
            else:
                values[key] = self.entry(below, child, (*path, key))
        return self.checked(cls, values, node, path)

    def array(self, cls: type[T], node: Node, path: KeyPath) -> tuple[T, ...] | None:
        if not isinstance(node.value, list):
            self.problem(node, path, f"should be an array of tables, {_got(node)}")
            return None
        entries = [self.entry(cls, item, (*path, i)) for i, item in enumerate(node.value)]
        filled = tuple(entry for entry in entries if entry is not None)
        return filled if len(filled) == len(entries) else None

    def entry(self, cls: type[T], node: Node, path: KeyPath) -> T | None:
        if issubclass(cls, Slot):
            return self.slot(cls, node, path)
        return self.table(cls, node, path)

    def slot(self, cls: type[T], node: Node, path: KeyPath) -> T | None:
        assert issubclass(cls, Slot)
        if not isinstance(node.value, dict):
            message = f'should be a table such as {{ use = "..." }}, {_got(node)}'
            self.problem(node, path, message)
            return None
        component = self.component(cls, node, path)
        options = component and self.options(cls, component, node, path)
        own = [key for key in cls.own_keys() if key in node.value]
        values: dict[str, Any] = {}
        for key in own:
            below, child = _table_of(cls.model_fields[key].annotation), node.value[key]
            if below is None:
                values[key] = _tuples(child.plain())
            else:
                values[key] = self.entry(below, child, (*path, key))
        values |= {"use": component and values["use"], "component": component, "options": options}
        return self.checked(cls, values, node, path)

    def component(self, cls: type[Slot], node: Node, path: KeyPath) -> Component | None:
        use = node.value.get("use")
        if use is None or not isinstance(use.value, str):
            names = sorted({item.name for item in self.catalog.of(cls.kind)})
            got = "" if use is None else f", {_got(use)}"
            label = cls.kind.replace("_", " ")
            message = f"should name a {label}{got}; there are: {', '.join(names)}"
            self.problem(use or node, (*path, "use"), message)
            return None
        try:
            return self.catalog.find(cls.kind, use.value)
        except PluginError as error:
            self.problem(use, (*path, "use"), str(error), plugin=True)
            return None

    def options(
        self, cls: type[Slot], component: Component, node: Node, path: KeyPath
    ) -> Options | None:
        own, options = cls.own_keys(), component.provider.options
        who = f"{component.name!r} of {component.origin}"
        shadowed = sorted(set(own) & set(options.model_fields))
        if shadowed:
            message = f"{who} has options that are keys of the slot itself: {', '.join(shadowed)}"
            self.problem(node, path, message, plugin=True)
            return None
        rest = replace(node, value={k: item for k, item in node.value.items() if k not in own})
        try:
            return options.model_validate_json(
                json.dumps(rest.plain()), context={"folders": _folders(rest)}
            )
        except ValidationError as error:
            no_option = partial(self.no_option, cls, component)
            for detail in error.errors(include_url=False):
                self.explain(detail, options, rest, path, no_option)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a validator of the plugin's
            message = f"{who} cannot check its options: {said(error)}"
            self.problem(node, path, message, plugin=True)
        return None

    def checked(
        self, cls: type[T], values: Mapping[str, Any], node: Node, path: KeyPath
    ) -> T | None:
        """The table of these values; None stands for a value whose problems are already told."""
        told = {key for key, value in values.items() if value is None}
        given = {key: value for key, value in values.items() if value is not None}
        try:
            table = cls.model_validate(given, context={"folders": _folders(node)})
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                if detail["loc"][:1] not in {(key,) for key in told}:
                    self.explain(detail, cls, node, path, partial(_no_key, cls))
            return None
        return None if told else table

    def explain(
        self,
        detail: ErrorDetails,
        cls: type[BaseModel],
        node: Node,
        path: KeyPath,
        unknown: Callable[[str], str],
    ) -> None:
        """Says one mistake that pydantic found in a table; ``unknown`` is the message about a key
        that is unknown."""
        at, place = node.at(detail["loc"])
        field = cls.model_fields.get(str(detail["loc"][0])) if detail["loc"] else None
        about = (field.description or "") if field else ""
        kind, message = detail["type"], detail["msg"]
        if kind == "missing":
            place = detail["loc"]
            message = f"required: {about}" if about and len(place) == 1 else "required"
            message += _dropped(node, place)
        elif kind == "extra_forbidden":
            message = unknown(str(place[-1])) if len(place) == 1 else "unknown key"
        elif kind in ("value_error", "assertion_error"):
            message = message.partition(", ")[2]
        else:
            if kind == "string_pattern_mismatch" and about:
                message, about = f"should be {about}", ""
            for ours, theirs in _WORDS.items():
                message = message.replace(theirs, ours)
            message = f"{message}, {_got(at)}{_quoted(kind, at)}{about and f' ({about})'}"
        self.problem(at, (*path, *place), message)

    def no_option(self, cls: type[Slot], component: Component, key: str) -> str:
        """What is said of an option that a component does not have."""
        known = [*cls.own_keys(), *component.provider.options.model_fields]
        others = sorted(
            {i.name for i in self.catalog.of(cls.kind) if key in i.provider.options.model_fields}
        )
        whose = f": an option of {' and '.join(map(repr, others))}, not of {component.name!r}"
        return f"unknown key{whose if others else ''}{did_you_mean(key, known)}"

    def problem(self, node: Node, path: KeyPath, message: str, plugin: bool = False) -> None:
        self.problems.append(Problem(node.origin, dotted(path), message, plugin))


def _no_key(cls: type[Table], key: str) -> str:
    """What is said of a key that a table does not have."""
    known = [*cls.model_fields, *(("extends",) if cls is Recipe else ())]
    places = [*_places(key, Recipe)]
    if key not in known and places:
        return f"unknown key here; did you mean {' or '.join(places)}?"
    return f"unknown key{did_you_mean(key, known)}"


def _places(key: str, table: type[Table], above: str = "") -> Iterator[str]:
    """Where in a recipe a key of that name is, as messages name it."""
    top = "" if above else " at the top, before the first [table]"
    names = table.own_keys() if issubclass(table, Slot) else (*table.model_fields,)
    if key in (*names, *(() if above else ("extends",))) and key != "use":
        yield f"{above + key!r}{top}"
    for name in names:
        annotation = table.model_fields[name].annotation
        below = _table_of(annotation)
        if below is not None and below is not table and get_origin(annotation) is not tuple:
            yield from _places(key, below, f"{above}{name}.")


def _dropped(node: Node, place: KeyPath) -> str:
    """The end of a message about a missing key that the table had under another ``use``."""
    if node.dropped is None or node.dropped.child(place[0]) is None:
        return ""
    use, key = node.dropped.value["use"].value, node.dropped.value[place[0]]
    return (
        f"; the {inline(key.plain())} of {key.origin} was for {inline({'use': use})}, and a table "
        "that states another use keeps nothing"
    )


def _quoted(kind: str, at: Node) -> str:
    """A hint if what stands there in quotes would be right without them."""
    try:
        inside = tomllib.loads(f"x = {at.value}")["x"] if isinstance(at.value, str) else None
    except tomllib.TOMLDecodeError:
        return ""
    fits = {"int_type": (int,), "float_type": (int, float), "bool_type": (bool,)}.get(kind, ())
    return "; write it without the quotes" if type(inside) in fits and at.origin != SET else ""


_WORDS = {
    "should": "Input should",
    "array": "tuple",
    "Array": "Tuple",
    "table": "dictionary",
    "": " after validation",
}


def _got(node: Node) -> str:
    """What stands there, for the end of a message."""
    indices = isinstance(node.value, dict) and node.value and all(map(str.isdecimal, node.value))
    if node.origin == SET and indices:
        return "and the recipe's files state none whose elements could be set"
    return f"got {inline(node.plain())}"


def _table_of(annotation: Any) -> type[Table] | None:
    """The table that a field holds: itself, as an option, or in an array."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Table):
            return candidate
    return None


def _tuples(value: Any) -> Any:
    """Arrays as tuples, which is how the recipe's own tables declare them."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _folders(node: Node) -> dict[str, str]:
    """For each key stated in a table the folder that a relative path counts from."""
    folders: dict[str, str] = {}
    for key, item in node.value.items():
        if isinstance(item.value, dict):
            folders = _folders(item) | folders
        if item.value != "":
            folders[key] = str(item.origin.file.parent if item.origin.file else Path.cwd())
    return folders
