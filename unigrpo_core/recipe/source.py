"""From files to one tree of values: ``extends``, merging, ``--set``, and where each value is from.

Tables merge, arrays and scalars replace. A table with a ``use`` is a component and atomic on it:
when a child states another ``use``, nothing of the parent's table survives.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from unigrpo_core.errors import shown
from unigrpo_core.recipe.positions import KeyPath, positions
from unigrpo_core.recipe.problems import Origin, Problem, RecipeError
from unigrpo_core.recipe.shipped import shipped_recipes
from unigrpo_core.recipe.syntax import explain

SET = Origin(None)  # where the values of --set are from

_DOTTED = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_WORD = re.compile(r"[\w~./\\:@+-]+")
_POINT = re.compile(r"""("(?:\\.|[^"\\])*"|'[^']*')|(?<![^\s\[,=+-])\.(?=\d)""")


@dataclass(frozen=True)
class Node:
    """A value of a recipe and where it is from. ``value`` is a dict of nodes for a table, a list
    of nodes for an array, else a string, number or boolean. ``dropped`` is the parent's table of
    which nothing survived, where a child stated another ``use``."""

    value: Any
    origin: Origin
    dropped: Node | None = None

    def child(self, key: str | int) -> Node | None:
        """The node of a table's key or of an array's element, if there is one."""
        found: Node | None = None
        if isinstance(self.value, dict):
            found = self.value.get(key)
        elif isinstance(self.value, list) and isinstance(key, int) and key < len(self.value):
            found = self.value[key]
        return found

    def at(self, path: KeyPath) -> tuple[Node, KeyPath]:
        """The node at the path, or the nearest above it that exists, and its path."""
        node: Node = self
        for place, key in enumerate(path):
            child = node.child(key)
            if child is None:
                return node, path[:place]
            node = child
        return node, path

    def plain(self) -> Any:
        """The value without its origins."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def dotted(path: KeyPath) -> str:
    """The path as people write it."""
    return ".".join(map(str, path))


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> Node:
    """The merged tree of a recipe file, all that it extends, and ``path=value`` overrides.

    Raises:
        RecipeError: a file is missing or is not a TOML text, or an override means nothing.
    """
    problems: list[Problem] = []
    tree = _read(Path(path).absolute(), Origin(Path(path).absolute()), "", (), problems)
    if tree is not None:
        for layer in _layers(overrides, problems):
            tree = _merge(tree, layer, (), problems)
    if problems or tree is None:
        raise RecipeError(problems)
    return tree


def _read(
    file: Path, asked: Origin, key: str, chain: tuple[Path, ...], problems: list[Problem]
) -> Node | None:
    """The merged tree of a file and what it extends; None after a problem. ``asked`` and ``key``
    say where the file is named, ``chain`` are the files that led to it."""
    known = [other.resolve() for other in chain]
    if file.resolve() in known:
        cycle = (*chain[known.index(file.resolve()) :], file)
        names = " -> ".join(shown(other) for other in cycle)
        problems.append(Problem(asked, key, f"the recipes extend each other in a circle: {names}"))
        return None
    what = "" if asked.line is None else f"{shown(file)}: "
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        problems.append(Problem(Origin(file, line), "", "not UTF-8 text; save the file as UTF-8"))
        return None
    except IsADirectoryError:
        problems.append(Problem(asked, key, f"{what}is a folder, not a recipe file{_within(file)}"))
        return None
    except FileNotFoundError:
        problems.append(Problem(asked, key, f"{what}no such file{_elsewhere(asked, file)}"))
        return None
    except OSError as error:
        problems.append(Problem(asked, key, f"{what}cannot be read: {error.strerror}"))
        return None
    node = _parse(text, file, problems)
    if node is None:
        return None
    tree = Node({}, node.origin)
    for place, parent in enumerate(_parents(node, problems)):
        base = _read(
            _meant(file, parent.value), parent.origin, f"extends.{place}", (*chain, file), problems
        )
        if base is not None:
            tree = _merge(tree, base, (), problems)
    own = {key: value for key, value in node.value.items() if key != "extends"}
    return _merge(tree, replace(node, value=own), (), problems)


def _meant(file: Path, extended: str) -> Path:
    """The file that another one extends: one beside it, or else a shipped one."""
    beside, shipped = file.parent / extended, shipped_recipes() / extended
    return shipped if shipped.is_file() and not beside.exists() else beside


def _within(folder: Path) -> str:
    """The end of a message: what in a folder may have been meant, such as a run's recipe."""
    files = sorted(folder.glob("*.toml"))[:3]
    return f"; did you mean {' or '.join(shown(file) for file in files)}?" if files else ""


def _elsewhere(asked: Origin, file: Path) -> str:
    """The end of a message about a missing file that a recipe extends."""
    if asked.line is None:
        return ""
    shipped = shipped_recipes() / file.name
    where = f"; the shipped one is {shown(shipped)}" if shipped.is_file() else ""
    return f"; a path counts from the file that states it{where}"


def _parse(text: str, file: Path, problems: list[Problem]) -> Node | None:
    try:
        data = tomllib.loads(f"{text}\n")  # a mistake in the last line is then said to be there
    except tomllib.TOMLDecodeError as error:
        line, message = explain(error, text)
        problems.append(Problem(Origin(file, line), "", message))
        return None
    if not data:
        message = 'the file states nothing; begin with extends = ["..."], or see `unigrpo show`'
        problems.append(Problem(Origin(file), "", message))
        return None
    lines = positions(text)

    def node(value: Any, path: KeyPath) -> Node:
        origin = Origin(file, lines.get(path))  # the file as a whole has no line
        if isinstance(value, dict):
            return Node({key: node(item, (*path, key)) for key, item in value.items()}, origin)
        if isinstance(value, list):
            return Node([node(item, (*path, place)) for place, item in enumerate(value)], origin)
        if isinstance(value, date | datetime | time):
            problems.append(Problem(origin, dotted(path), "a date means nothing here; quote it"))
        return Node(value, origin)

    return node(data, ())


def _parents(node: Node, problems: list[Problem]) -> list[Node]:
    stated = node.value.get("extends", Node([], node.origin))
    files = stated.value
    if isinstance(files, list) and all(isinstance(item.value, str) for item in files):
        return files
    message = 'expected an array of file names such as ["_base/board.toml"]'
    problems.append(Problem(stated.origin, "extends", message))
    return []


def _merge(parent: Node, child: Node, path: KeyPath, problems: list[Problem]) -> Node:
    """The child laid over the parent. Number keys of a ``--set`` table index a parent's array."""
    if not isinstance(child.value, dict):
        return child
    if child.origin == SET and isinstance(parent.value, list):
        return _merge_elements(parent, child, path, problems)
    base: dict[str, Node] = parent.value if isinstance(parent.value, dict) else {}
    ours, theirs = child.value.get("use"), base.get("use")
    dropped = child.dropped or parent.dropped
    if ours is not None and theirs is not None and ours.value != theirs.value:
        base, dropped = {}, parent
    merged = dict(base)
    for key, value in child.value.items():
        below = base.get(key, Node(None, child.origin))
        merged[key] = _merge(below, value, (*path, key), problems)
    keeps = child.origin == SET and base
    return Node(merged, parent.origin if keeps else child.origin, dropped)


def _merge_elements(parent: Node, child: Node, path: KeyPath, problems: list[Problem]) -> Node:
    elements = list(parent.value)
    for key, value in child.value.items():
        if not (key.isdecimal() and int(key) < len(elements)):
            count = f"{len(elements)} element{'s' if len(elements) != 1 else ''}"
            message = f"{key!r} is no element: the array has {count}, counted from 0"
            problems.append(Problem(SET, dotted(path), message))
            continue
        elements[int(key)] = _merge(elements[int(key)], value, (*path, int(key)), problems)
    return Node(elements, SET)


def _layers(overrides: Sequence[str], problems: list[Problem]) -> list[Node]:
    """The overrides as one layer (none without overrides)."""
    layer = Node({}, SET)
    for override in overrides:
        path, equals, text = override.partition("=")
        path = path.strip()
        if not equals or not _DOTTED.fullmatch(path):
            problems.append(Problem(SET, override, "expected path=value, such as seed=1"))
            continue
        if path.split(".")[0] == "extends":
            problems.append(Problem(SET, path, "only a recipe file can extend others"))
            continue
        try:
            node = _value(text.strip())
        except ValueError as error:
            problems.append(Problem(SET, path, str(error)))
            continue
        for key in reversed(path.split(".")):
            node = Node({key: node}, SET)
        layer = _merge(layer, node, (), problems)
    return [layer] if layer.value else []


def parse_value(text: str) -> Any:
    """The value of an override: TOML, or a plain word or path that needs no quotes. A number may
    begin with its point, such as .5, which TOML does not allow.

    Raises:
        ValueError: it is neither.
    """
    for toml in (text, _POINT.sub(lambda found: found[1] or "0.", text)):
        try:
            data = tomllib.loads(f"value = {toml}")
        except tomllib.TOMLDecodeError:
            continue
        if len(data) == 1:
            return data["value"]
    if _WORD.fullmatch(text):
        return text
    hint = "; text stands in quotes, also within the shell's" if " " in text else ""
    raise ValueError(f"{text!r} is neither a TOML value nor a plain word{hint}")


def _value(text: str) -> Node:
    """The value of an override, as :func:`parse_value` says."""

    def node(value: Any) -> Node:
        if isinstance(value, dict):
            return Node({key: node(item) for key, item in value.items()}, SET)
        if isinstance(value, list):
            return Node([node(item) for item in value], SET)
        if isinstance(value, date | datetime | time):
            raise ValueError("a date means nothing here; quote it")
        return Node(value, SET)

    return node(parse_value(text))
