"""``unigrpo run``: trains a recipe and leaves a run folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from unigrpo_core.catalog import load_catalog
from unigrpo_core.cli.installed import Catalogs, warned
from unigrpo_core.cli.text import add_set
from unigrpo_core.recipe import find_recipe, load_recipe

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "run",
        help="train a recipe",
        description="Trains a recipe. Writes a run folder: metrics, sample sheets, final weights.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a file, or a shipped recipe")
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        help="the run folder, empty or new; default: runs/RECIPE-N with the next free number",
    )
    add_set(parser)
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    file = find_recipe(arguments.recipe)
    resolved = load_recipe(file, Catalogs(warned(load_catalog())).of(file), arguments.set)
    from unigrpo_core.cli.display import choose_reporter
    from unigrpo_core.engine.folder import next_folder
    from unigrpo_core.engine.loop import Run

    out = arguments.out or next_folder(Path("runs"), resolved.name)
    with choose_reporter() as reporter:
        trained = Run(resolved, out, reporter)
        for note in trained.notes:
            print(f"note: {note}")
        trained()
    return 0
