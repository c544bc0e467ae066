"""The grid of an ablation: its cells, every one resolved and linked to what comes first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from unigrpo_core.ablation.axes import Axis, cell_name, parse_axis, tails
from unigrpo_core.ablation.jobs import Cell, counted
from unigrpo_core.catalog import Catalog
from unigrpo_core.errors import PluginError, UsageError, shown
from unigrpo_core.recipe import (
    Origin,
    Problem,
    RecipeError,
    Resolved,
    find_recipe,
    load_recipe,
)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from ``0,1,2``.

    Raises:
        UsageError: one is no whole number from 0 on, or stands twice.
    """
    seeds: list[int] = []
    for word in map(str.strip, text.split(",")):
        if not (word.isascii() and word.isdecimal()):
            raise UsageError(f"--seeds {text}: {word!r} is no seed; expected such as 0,1,2")
        if int(word) in seeds:
            raise UsageError(f"--seeds {text}: seed {int(word)} stands twice")
        seeds.append(int(word))
    return tuple(seeds)


def grid(
    words: Sequence[str],
    axes: Sequence[str],
    overrides: Sequence[str],
    catalog_of: Callable[[Path], Catalog],
) -> tuple[Cell, ...]:
    """The cells of recipes (files, or names of shipped ones) x axes, every one resolved.

    Raises:
        UsageError: with every problem there is, one per line.
        PluginError: the same, if plugins alone are at fault.
    """
    problems: list[Problem | str] = []
    files = list(_files(words, problems))
    parsed = list(_axes(axes, overrides, problems))
    cells: dict[tuple[Path, int], Cell] = {}
    if not problems:
        for file in files:
            for place, pick in enumerate(product(*(range(len(axis.texts)) for axis in parsed))):
                cell = _cell(file, parsed, pick, overrides, catalog_of, problems)
                if cell is not None:
                    cells[file.resolve(), place] = cell
        problems += _twice(cells)
    linked = _linked(files, cells, problems)
    if problems:
        plugins = all(isinstance(item, Problem) and item.plugin for item in problems)
        raise (PluginError if plugins else UsageError)("\n".join(dict.fromkeys(map(str, problems))))
    return linked


def _files(words: Sequence[str], problems: list[Problem | str]) -> Iterator[Path]:
    known: dict[str, Path] = {}
    for word in words:
        try:
            file = find_recipe(word).absolute()
        except RecipeError as error:
            problems += error.problems
            continue
        other = known.setdefault(file.stem.casefold(), file)
        if other is file:
            yield file
        elif other == file:
            problems.append(f"{shown(file)} is given twice")
        else:
            problems.append(
                f"{shown(other)} and {shown(file)} have one name, and a run's folder has that of "
                "its recipe: rename one, or give each its own --out"
            )


def _axes(
    words: Sequence[str], overrides: Sequence[str], problems: list[Problem | str]
) -> Iterator[Axis]:
    known: list[str] = []
    sets = [override.partition("=")[0].strip() for override in overrides]
    if "seed" in sets:
        problems.append("--set seed: the seeds of an ablation are those of --seeds")
    for word in words:
        try:
            axis = parse_axis(word)
        except ValueError as error:
            problems.append(str(error))
            continue
        hidden = [key for key in sets if f"{key}.".startswith(f"{axis.key}.")]
        if axis.key == "seed":
            problems.append("--axis seed: the seeds of an ablation are those of --seeds")
        elif axis.key in known:
            problems.append(f"--axis {axis.key} stands twice; give all its values at once")
        elif hidden:
            problems.append(f"--axis {axis.key} would undo --set {hidden[0]}; drop one of them")
        else:
            yield axis
        known.append(axis.key)


def _cell(
    file: Path,
    axes: Sequence[Axis],
    pick: Sequence[int],
    overrides: Sequence[str],
    catalog_of: Callable[[Path], Catalog],
    problems: list[Problem | str],
) -> Cell | None:
    picked = list(zip(axes, pick, strict=True))
    names = [axis.names[place] for axis, place in picked]
    tailed = zip(tails([axis.key for axis in axes]), names, strict=True)
    texts = (*overrides, *(f"{axis.key}={axis.texts[place]}" for axis, place in picked))
    try:
        resolved: Resolved = load_recipe(file, catalog_of(file), texts)
    except RecipeError as error:
        problems += (_told(file, axes, problem) for problem in error.problems)
        return None
    except PluginError as error:
        problems.append(Problem(Origin(file), "", str(error), plugin=True))
        return None
    return Cell(
        cell_name(file.stem, list(tailed)),
        file,
        texts,
        resolved.values,
        "" if resolved.file is None else resolved.file.sha256,
    )


def _told(file: Path, axes: Sequence[Axis], problem: Problem) -> Problem:
    """A problem of the command line's values says which recipe has it, and whose value it is."""
    if problem.file is not None:
        return problem
    near = f"{problem.path}."
    ours = any(near.startswith(f"{a.key}.") or f"{a.key}.".startswith(near) for a in axes)
    path = f"{'--axis' if ours else '--set'} {problem.path}"
    return Problem(Origin(file), path, problem.message, problem.plugin)


def _twice(cells: Mapping[tuple[Path, int], Cell]) -> Iterator[str]:
    """Cells that could not be told apart: of one name, or of one recipe and equal values."""
    names: dict[str, Cell] = {}
    values: list[Cell] = []
    for cell in cells.values():
        other = names.setdefault(cell.name.casefold(), cell)
        if other is not cell:
            yield f"two cells would be called {cell.name}: {_axes_of(other)} and {_axes_of(cell)}"
            continue
        for known in values:
            if known.recipe == cell.recipe and counted(known.values) == counted(cell.values):
                yield f"{known.name} and {cell.name} are the same run; drop one of the values"
        values.append(cell)


def _axes_of(cell: Cell) -> str:
    return " ".join([shown(cell.recipe), *cell.overrides])


def _linked(
    files: Sequence[Path], cells: Mapping[tuple[Path, int], Cell], problems: list[Problem | str]
) -> tuple[Cell, ...]:
    """The cells with the cells that come first, which are those with the same axis values."""
    given = {file.resolve() for file in files}

    def link(key: tuple[Path, int], chain: tuple[Path, ...]) -> Cell | None:
        cell, (file, place) = cells.get(key), key
        if cell is None:  # why is told already
            return None
        if file in chain:
            circle = chain[chain.index(file) :]
            least = circle.index(min(circle))  # told once, wherever it was entered
            names = [shown(step) for step in (*circle[least:], *circle[: least + 1])]
            problems.append(f"the recipes come after each other in a circle: {' -> '.join(names)}")
            return None
        if cell.values["start"] or not cell.values["after"]:
            return cell
        after = Path(cell.values["after"]).resolve()
        if after not in given:
            problems.append(
                f"{shown(cell.recipe)}: after: its first stage is not among the recipes; add "
                f"{shown(after)}"
            )
            return None
        first = link((after, place), (*chain, file))
        return first and replace(cell, first=first)

    return tuple(cell for key in cells if (cell := link(key, ())) is not None)
