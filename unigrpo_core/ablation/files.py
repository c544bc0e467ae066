"""JSON files of a run folder; what is damaged is told with file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from unigrpo_core.errors import UserError, shown

Row = Mapping[str, Any]


@contextmanager
def damage(file: Path, line: int | None = None) -> Iterator[None]:
    """Around what takes values out of a file.

    Raises:
        UserError: the file cannot be read, or a value is absent or of another kind than expected.
    """
    where = shown(file) if line is None else f"{shown(file)}:{line}"
    try:
        yield
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror or error}") from error
    except KeyError as error:
        raise UserError(f"{where} is damaged: it lacks {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where} is damaged: {error}") from error


def read_json(file: Path) -> Row:
    """The object that a file holds."""
    with damage(file):
        return _object(file.read_text(encoding="utf-8"))


def read_rows(file: Path, keys: Sequence[str] = ()) -> tuple[Row, ...]:
    """The objects that a file holds, one a line: numbers by name, among them "step" and keys."""
    with damage(file):
        lines = file.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        with damage(file, number):
            row = _object(line)
            strange = [key for key, value in row.items() if not isinstance(value, int | float)]
            if strange:
                raise ValueError(f"{strange[0]!r} is no number")
            for key in ("step", *keys):
                row[key]
            rows.append(row)
    return tuple(rows)


def _object(text: str) -> Row:
    value = json.loads(text, parse_constant=_refuse)
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not finite")
