"""``unigrpo check``: is a recipe right, and what should its user know? Loads no model."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigrpo_core.catalog import load_catalog
from unigrpo_core.cli.installed import Catalogs, warned
from unigrpo_core.cli.text import add_json, add_set, as_json
from unigrpo_core.errors import PluginError
from unigrpo_core.recipe import (
    Origin,
    Problem,
    RecipeError,
    Resolved,
    find_recipe,
    load_recipe,
)

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("check", help="check recipes without loading a model")
    parser.add_argument("recipe", nargs="+", metavar="RECIPE", help="a file, or a shipped recipe")
    add_set(parser)
    add_json(parser)
    parser.set_defaults(handler=check)


def check(arguments: argparse.Namespace) -> int:
    catalogs = Catalogs(warned(load_catalog()))
    reports = [_report(word, catalogs, arguments.set) for word in arguments.recipe]
    if arguments.json:
        print(as_json([report.as_json() for report in reports]))
    else:
        for report in reports:
            print(report)
    codes = {report.code for report in reports} - {0}
    return min(codes, default=0)


@dataclass(frozen=True)
class Report:
    """What is said of one recipe; ``resolved`` is None where it has problems, ``file`` where the
    word means none."""

    word: str
    file: Path | None
    code: int
    resolved: Resolved | None = None
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        recipe = self.resolved
        return {
            "recipe": self.word,
            "file": None if self.file is None else str(self.file),
            "ok": not self.problems,
            "name": recipe and recipe.name,
            "title": recipe and recipe.recipe.title,
            "hash": recipe and recipe.hash,
            "problems": [
                {
                    "file": None if problem.file is None else str(problem.file),
                    "line": problem.line,
                    "path": problem.path,
                    "message": problem.message,
                }
                for problem in self.problems
            ],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        if self.resolved is None:
            return "\n".join(map(str, self.problems))
        title = self.resolved.recipe.title
        ok = f"ok {self.resolved.name}{f'  ({title})' if title else ''}"
        return "\n  note: ".join([ok, *self.notes])


def _report(word: str, catalogs: Catalogs, overrides: list[str]) -> Report:
    file: Path | None = None
    try:
        file = find_recipe(word).absolute()
        resolved = load_recipe(file, catalogs.of(file), overrides)
        return Report(word, file, 0, resolved, notes=tuple(resolved.notes()))
    except RecipeError as error:
        return Report(word, file, error.exit_code, problems=error.problems)
    except PluginError as error:  # it cannot say its notes
        problem = Problem(Origin(file), "", str(error), plugin=True)
        return Report(word, file, error.exit_code, problems=(problem,))
