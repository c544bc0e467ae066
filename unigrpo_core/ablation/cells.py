"""Runs into cells: which belong together, and what a cell is called."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unigrpo_core.ablation.axes import tails
from unigrpo_core.ablation.runs import Run
from unigrpo_core.errors import UserError, shown
from unigrpo_core.recipe import toml_value
from unigrpo_core.recipe.emit import leaves

APART = ("seed", "title", "after")  # what runs of one cell may differ in


@dataclass(frozen=True)
class Cell:
    """The runs of one recipe, one per seed in ascending order."""

    label: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)


def to_cells(runs: Sequence[Run]) -> tuple[tuple[Cell, ...], list[str]]:
    """The runs as cells in the order of their first runs, and notes on what was counted once.

    Raises:
        UserError: two runs are two results of one cell and seed; it names both folders.
    """
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(_identity(run), []).append(run)
    found = [_once(group) for group in groups.values()]
    cells = tuple(
        Cell(label, tuple(kept))
        for label, (kept, _) in zip(_labels([*groups.values()]), found, strict=True)
    )
    return cells, [note for _, notes in found for note in notes]


def _identity(run: Run) -> tuple[object, ...]:
    """Equal for the runs of one cell. What is known of the stage before a later one is its name, so
    there the cells' names count too."""
    values = {key: value for key, value in said(run).items() if key not in APART}
    return (
        tuple(sorted((key, toml_value(value)) for key, value in values.items())),
        name_of(run) if run.staged else None,
    )


def name_of(run: Run) -> str:
    """What the folders call the run's cell: CELL in CELL/seed-S, else the recipe's name."""
    folder = run.folder.absolute()
    return folder.parent.name if re.fullmatch(r"seed-\d+", folder.name) else run.name


def said(run: Run) -> dict[str, Any]:
    """What made a run: its recipe's values by their dotted paths, in start the stage before, and
    the plugin file beside it."""
    values = {".".join(map(str, path)): value for path, value in leaves(run.values)}
    values["start"] = run.stage_before
    return values | ({"plugin_file": run.plugin_file[:8]} if run.plugin_file else {})


def _once(group: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """A cell's runs by seed, each seed once."""
    kept: dict[int, Run] = {}
    notes = []
    for run in group:
        other = kept.setdefault(run.seed, run)
        if other is run:
            continue
        both = f"{shown(other.folder)} and {shown(run.folder)}"
        if (other.evaluations, other.metrics) != (run.evaluations, run.metrics):
            raise UserError(
                f"{both} have the same values and seed {run.seed}, but different results: leave "
                "one of them out"
            )
        notes.append(f"{both} are the same run (seed {run.seed}), which is counted once")
    for run in kept.values():
        _check_steps(group[0], run)
    names = dict.fromkeys(map(name_of, group))
    if len(names) > 1:
        one = _most_common_name(group)
        notes.append(f"{' and '.join(names)} have the same values: they are one cell, {one}")
    return [kept[seed] for seed in sorted(kept)], notes


def _check_steps(one: Run, two: Run) -> None:
    """Raises a UserError unless the two were evaluated at the same steps, or end where a budget was
    spent."""
    if one.values.get("budget"):
        return
    for name in set(one.metric_names) & set(two.metric_names):
        curves = [run.curve(name) for run in (one, two)]
        if len({curve.steps for curve in curves if curve}) > 1:
            raise UserError(
                f"{shown(one.folder)} and {shown(two.folder)} have the same values, but {name} was "
                "evaluated at different steps: evaluation.jsonl of one of them is damaged"
            )


def _most_common_name(runs: Sequence[Run]) -> str:
    return Counter(map(name_of, runs)).most_common(1)[0][0]


# --- labels -----------------------------------------------------------------------------------


def _labels(cells: Sequence[Sequence[Run]]) -> list[str]:
    """A label per cell; cells of one name bear the values in which they differ."""
    names = [_most_common_name(runs) for runs in cells]
    labels = []
    for name, runs in zip(names, cells, strict=True):
        namesakes = [said(o[0]) for other, o in zip(names, cells, strict=True) if other == name]
        paths = [path for path in differing(namesakes) if path not in APART]
        mine = said(runs[0])
        marks = [
            f"{tail}={toml_value(mine[path]) if path in mine else '-'}"
            for path, tail in zip(paths, tails(paths), strict=True)
        ]
        labels.append(" ".join([name, *marks]))
    return _distinct(labels)


def _distinct(labels: Sequence[str]) -> list[str]:
    """Labels that are still equal (of two results called alike) are numbered."""
    seen: Counter[str] = Counter()
    found = []
    for label in labels:
        seen[label] += 1
        found.append(label if seen[label] == 1 else f"{label} #{seen[label]}")
    return found


def differing(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """The paths whose values are not the same in all of them."""
    paths = dict.fromkeys(path for table in tables for path in table)
    return [p for p in paths if any(table.get(p) != tables[0].get(p) for table in tables)]
