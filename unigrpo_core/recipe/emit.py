"""Plain values as TOML text, one key per line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from unigrpo_core.recipe.positions import KeyPath

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def inline(value: Any) -> str:
    """The value on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{_key(key)} = {inline(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(inline(item) for item in value)}]"
    return repr(value)


def lines(table: Mapping[str, Any], above: KeyPath = ()) -> Iterator[tuple[str, KeyPath | None]]:
    """The lines of a table, each with the path of the value it states (None for headers)."""
    for key, value in table.items():
        if not (isinstance(value, Mapping) or _is_array_of_tables(value)):
            yield f"{_key(key)} = {inline(value)}", (*above, key)
    for key, value in table.items():
        path = (*above, key)
        header = ".".join(_key(part) for part in path if isinstance(part, str))
        if isinstance(value, Mapping):
            if not value or any(not isinstance(item, Mapping) for item in value.values()):
                yield "", None
                yield f"[{header}]", None
            yield from lines(value, path)
        elif _is_array_of_tables(value):
            for place, item in enumerate(value):
                yield "", None
                yield f"[[{header}]]", None
                yield from lines(item, (*path, place))


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every value that :func:`lines` states, with its path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif _is_array_of_tables(value):
        for place, item in enumerate(value):
            yield from leaves(item, (*path, place))
    else:
        yield path, value


def _is_array_of_tables(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(item, Mapping) for item in value)
    )


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else inline(key)
