"""Axes of an ablation: a key of a recipe, and the values it takes in turn."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from unigrpo_core.recipe import parse_value, toml_value

_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_TOKEN = re.compile(r"""("(?:\\.|[^"\\])*"|'[^']*')|.""", re.DOTALL)
_SAFE = re.compile(r"[\w.+=-]+")
_LONGEST = 160  # characters of a name: file systems take 255 bytes


@dataclass(frozen=True)
class Axis:
    """``texts`` are the values as a ``--set`` takes them, ``names`` the same as folders name
    them: equal values have equal names, however they are written."""

    key: str
    texts: tuple[str, ...]
    names: tuple[str, ...]


def parse_axis(word: str) -> Axis:
    """An axis from ``KEY=V,V,...``, where a V is TOML or a plain word; commas within brackets,
    braces and quotes belong to the value.

    Raises:
        ValueError: it is none, or two of its values are equal.
    """
    key, equals, text = word.partition("=")
    key = key.strip()
    if not equals or not _KEY.fullmatch(key):
        raise ValueError(f"--axis {word}: expected KEY=V,V,..., such as image.weight=0.5,1,2")
    texts = tuple(_split(text))
    if not all(texts):
        raise ValueError(f"--axis {word}: a value is empty; expected KEY=V,V,...")
    known: dict[str, str] = {}
    for item in texts:
        try:
            value = parse_value(item)
        except ValueError as error:
            raise ValueError(f"--axis {key}: {error}") from None
        exact = toml_value(_plain(value))
        if exact in known:
            raise ValueError(f"--axis {key}: {known[exact]} and {item} are the same value")
        known[exact] = item
    return Axis(key, texts, tuple(map(_safe, known)))


def tails(keys: Sequence[str]) -> tuple[str, ...]:
    """For each of the dotted keys its shortest tail that no other one has and that begins with no
    number."""
    return tuple(_tail(key, [other for other in keys if other != key]) for key in keys)


def cell_name(stem: str, pairs: Sequence[tuple[str, str]]) -> str:
    """The name of the cell of a recipe and its axes' (tail, value)."""
    name = ",".join([stem, *(f"{tail}={value}" for tail, value in pairs)])
    if len(name) <= _LONGEST:
        return name
    return f"{name[:_LONGEST]}-{blake2b(name.encode(), digest_size=4).hexdigest()}"


def _tail(key: str, others: Sequence[str]) -> str:
    parts = key.split(".")
    for count in range(1, len(parts)):
        tail = ".".join(parts[-count:])
        alone = not any(f".{other}".endswith(f".{tail}") for other in others)
        if alone and not parts[-count].isdecimal():
            return tail
    return key


def _split(text: str) -> Iterator[str]:
    """The parts between commas at the top level."""
    depth, part = 0, ""
    for found in _TOKEN.finditer(text):
        token = found[0]
        if token == "," and depth == 0:
            yield part.strip()
            part = ""
            continue
        depth += (token in ("[", "{")) - (token in ("]", "}"))
        part += token
    yield part.strip()


def _plain(value: Any) -> Any:
    """The value with whole numbers written one way: 1.0 is 1."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _safe(text: str) -> str:
    """A value as part of a file's name."""
    return "-".join(_SAFE.findall(text.replace(" = ", "="))) or "empty"
