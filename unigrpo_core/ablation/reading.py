"""Finished runs, read from their folders and checked; nothing is written. What is damaged is told
with file and line.

What a run folder holds: :mod:`unigrpo_core.engine.folder`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from unigrpo_core.ablation.runs import Row, Run, clock_of
from unigrpo_core.engine.cost import COUNTED
from unigrpo_core.errors import UserError, shown
from unigrpo_core.recipe.scored import score_names

_NUMBER = re.compile(r"((?:(?<!\w)-)?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")


def read_runs(places: Sequence[Path], skip_unfinished: bool) -> tuple[list[Run], list[str]]:
    """The runs in and below the folders, in the order of places and then of paths, each once; and
    notes on what was left out.

    Raises:
        UserError: a place is no folder or has no run, a run is not finished (unless these are to
            be skipped), or a file is damaged; it names the folder or the file and line.
    """
    folders: dict[Path, Path] = {}
    for place in places:
        found = list(_run_folders(place))
        if not found:
            raise UserError(
                f"{shown(place)} holds no run: expected a run folder (with run.json), or a folder "
                "below which there are some, as unigrpo run and unigrpo ablate leave them"
            )
        folders.update((folder.resolve(), folder) for folder in found)
    runs, notes = [], []
    for folder in folders.values():
        if (folder / "summary.json").exists():
            runs.append(read_run(folder))
        elif skip_unfinished:
            notes.append(f"{shown(folder)} is not finished and left out")
        else:
            raise UserError(
                f"{shown(folder)} is not finished (it has no summary.json): finish it, or leave "
                "it out with --skip-unfinished"
            )
    if not runs:
        raise UserError("no run is finished: there is nothing to compare")
    return runs, notes


def _run_folders(place: Path) -> Iterator[Path]:
    if not place.is_dir():
        raise UserError(f"{shown(place)}: {'is no folder' if place.exists() else 'no such folder'}")

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error

    seen = set()  # links may lead in a circle
    for folder, below, files in os.walk(place, onerror=refuse, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        if "run.json" in files:
            below.clear()
            yield Path(folder)
        below.sort(key=_natural)


def _natural(name: str) -> tuple[list[str | float], str]:
    """Sorts names by the numbers in them: lr=1e-05 before lr=.5 before lr=10."""
    parts = _NUMBER.split(name)  # text and number in turn
    return [float(part) if place % 2 else part for place, part in enumerate(parts)], name


def read_run(folder: Path) -> Run:
    """A finished run.

    Raises:
        UserError: a file is absent, damaged or shorter than the run; it names file and line.
    """
    about, summary = read_json(folder / "run.json"), read_json(folder / "summary.json")
    with damage(folder / "run.json"):
        values = about["values"]
        steps, seed, name = values["steps"], values["seed"], about["recipe"]
        steps = summary["steps"] if values.get("budget") else steps
        cuda, device = about["environment"]["cuda"], values["compute"]["device"]
        plugin_file = (about.get("plugin_file") or {}).get("sha256", "")
        if not all(isinstance(number, int) for number in (steps, seed)):
            raise TypeError("steps and seed should be whole numbers")
        score_names(values)
        plugins = {str(name): str(made) for name, made in about.get("plugins", {}).items()}
    with damage(folder / "summary.json"):
        before = summary.get("earlier") or {}
        earlier = {key: float(before[key]) for key in COUNTED if before.get(key) is not None}
    on_gpu = cuda is not None and device != "cpu"
    evaluations = _read_rows(folder / "evaluation.jsonl", ("prompts",))
    metrics = _read_rows(folder / "metrics.jsonl") if steps else ()
    timing = _read_rows(folder / "timing.jsonl", (clock_of(on_gpu),)) if steps else ()
    for file, rows in (("metrics.jsonl", metrics), ("timing.jsonl", timing)):
        _expect(folder / file, [row["step"] for row in rows] == [*range(1, steps + 1)], steps)
    evaluated = [row["step"] for row in evaluations]
    ordered = evaluated == sorted(set(evaluated))
    edges = bool(evaluated) and (evaluated[0], evaluated[-1]) == (0, steps)
    _expect(folder / "evaluation.jsonl", ordered and edges, steps)
    run = Run(
        *(folder, name, values, plugin_file, plugins, on_gpu, earlier),
        *(evaluations, metrics, timing),
    )
    if not run.metric_names:
        raise UserError(f"{shown(folder / 'evaluation.jsonl')} is damaged: it has no metric")
    return run


def _expect(file: Path, right: bool, steps: int) -> None:
    if not right:
        raise UserError(
            f"{shown(file)} is damaged: its rows are not those of {steps} steps in order; "
            "run it again"
        )


# --- JSON -------------------------------------------------------------------------------------


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


def _read_rows(file: Path, keys: Sequence[str] = ()) -> tuple[Row, ...]:
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
