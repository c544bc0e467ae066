"""``unigrpo show``: the shipped recipes, a recipe with everything filled in, or two compared."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from unigrpo_core.catalog import load_catalog
from unigrpo_core.cli.installed import Catalogs, warned
from unigrpo_core.cli.text import add_json, add_set, as_json, table
from unigrpo_core.errors import UsageError
from unigrpo_core.recipe import (
    Resolved,
    difference,
    find_recipe,
    load_recipe,
    shipped_titles,
    toml_value,
)

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "show",
        help="list recipes, show one with the origin of every value, or compare two",
        description="Without RECIPE: lists the shipped recipes. With one: shows it with "
        "everything filled in and the origin of every value. With two: their differences; "
        "--set then applies to the second.",
    )
    parser.add_argument("recipe", nargs="*", metavar="RECIPE", help="a file, or a shipped recipe")
    add_set(parser)
    add_json(parser)
    parser.set_defaults(handler=show)


def show(arguments: argparse.Namespace) -> int:
    words = arguments.recipe
    if len(words) > 2:
        raise UsageError(f"show compares two recipes at most, got {len(words)}")
    if not words and arguments.set:
        raise UsageError("--set needs a recipe to apply to")
    if not words:
        print(_listing(arguments.json))
        return 0
    catalogs = Catalogs(warned(load_catalog()))
    *others, last = map(find_recipe, words)
    resolved = load_recipe(last, catalogs.of(last), arguments.set)
    if others:
        other = load_recipe(others[0], catalogs.of(others[0]))
        print(_comparison(other, resolved, arguments.json))
    else:
        print(_one(resolved, arguments.json))
    return 0


def _listing(json: bool) -> str:
    titles = shipped_titles()
    if json:
        return as_json([{"name": name, "title": title} for name, title in titles.items()])
    return table([("recipe", "title"), *titles.items()])


def _one(resolved: Resolved, json: bool) -> str:
    if json:
        return as_json(
            {
                "name": resolved.name,
                "hash": resolved.hash,
                "values": resolved.values,
                "origins": {path: str(origin) for path, origin in resolved.origins.items()},
            }
        )
    lines = [
        (text, "" if path is None else f"# {resolved.origins[path]}")
        for text, path in resolved.lines()
    ]
    return f"# {resolved.name}, hash {resolved.hash}\n{table(lines)}"


def _comparison(a: Resolved, b: Resolved, json: bool) -> str:
    rows = difference(a, b)
    if json:
        return as_json(
            {
                "a": a.name,
                "b": b.name,
                "differences": [
                    {"path": path, "a": ours, "b": other} for path, ours, other in rows
                ],
            }
        )
    if not rows:
        return f"no difference: both have hash {a.hash}"
    values = [
        (path, *("-" if value is None else toml_value(value) for value in pair))
        for path, *pair in rows
    ]
    return table([("path", a.name, b.name), *values])
