"""``unigrpo sample``: a finished run thinks and draws for a new prompt."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from unigrpo_core.catalog import load_catalog
from unigrpo_core.cli.installed import warned
from unigrpo_core.cli.text import add_set
from unigrpo_core.errors import UsageError
from unigrpo_core.loading import PLUGIN_FILE
from unigrpo_core.recipe import load_recipe, toml_value

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "sample",
        help="let a finished run think and draw for a prompt",
        description="Samples episodes for a prompt with a run's final weights; writes a picture.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--count", type=int, default=4, help="how many episodes (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default 0)")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="the picture; default: RUN/samples/N.png"
    )
    add_set(parser)
    parser.set_defaults(handler=sample)


def sample(arguments: argparse.Namespace) -> int:
    if arguments.count < 1:
        raise UsageError(f"--count is {arguments.count}, expected 1 or more")
    if not arguments.prompt.strip():
        raise UsageError("the prompt is empty")
    recipe = arguments.run / "recipe.toml"
    if not recipe.is_file():
        raise UsageError(f"{arguments.run} is no run folder: it has no recipe.toml")
    if (arguments.run / PLUGIN_FILE).is_file():
        why = "sampling runs no code of a run folder (--set 'rewards=[{use=\"random\"}]' may help)"
        print(f"does not use {arguments.run / PLUGIN_FILE}: {why}", file=sys.stderr)
    start = f"start={toml_value(str(arguments.run.resolve()))}"
    overrides = [*arguments.set, "train=[]", "steps=0", start]
    resolved = load_recipe(recipe, warned(load_catalog()), overrides)
    from unigrpo_core.engine.draw import draw_samples

    out = arguments.out or _next_picture(arguments.run / "samples")
    drawn = draw_samples(resolved, arguments.prompt, arguments.count, arguments.seed, out)
    if drawn.thoughts is None:
        print("draws without thinking")
    for thought in drawn.thoughts or ():
        print(f"thinks: {thought or '(an empty thought)'}")
    for said in drawn.cuts:
        print(f"note: {said}")
    print(f"picture: {out}")
    return 0


def _next_picture(folder: Path) -> Path:
    number = 1
    while (folder / f"{number}.png").exists():
        number += 1
    return folder / f"{number}.png"
