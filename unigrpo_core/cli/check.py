"""``unigrpo check``: is a recipe right, and what should its user know? Loads no model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from unigrpo_core.catalog import load_catalog
from unigrpo_core.cli.installed import Catalogs, warned
from unigrpo_core.cli.text import add_json, add_set, as_json
from unigrpo_core.recipe import RecipeError, find_recipe, load_recipe

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
        print(as_json([{k: v for k, v in report.items() if k != "code"} for report in reports]))
    else:
        for report in reports:
            print(_text(report))
    codes = {report["code"] for report in reports} - {0}
    return min(codes, default=0)


def _report(word: str, catalogs: Catalogs, overrides: list[str]) -> dict[str, Any]:
    try:
        file = find_recipe(word)
        resolved = load_recipe(file, catalogs.of(file), overrides)
    except RecipeError as error:
        problems = [
            {
                "file": None if problem.file is None else str(problem.file),
                "line": problem.line,
                "path": problem.path,
                "message": problem.message,
                "text": str(problem),
            }
            for problem in error.problems
        ]
        return {"recipe": word, "ok": False, "code": error.exit_code, "problems": problems}
    return {
        "recipe": word,
        "ok": True,
        "code": 0,
        "name": resolved.name,
        "title": resolved.recipe.title,
        "hash": resolved.hash,
        "notes": resolved.notes(),
    }


def _text(report: dict[str, Any]) -> str:
    if not report["ok"]:
        return "\n".join(problem["text"] for problem in report["problems"])
    title = f"  ({report['title']})" if report["title"] else ""
    return "\n  note: ".join([f"ok {report['name']}{title}", *report["notes"]])
