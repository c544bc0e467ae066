"""``unigrpo check``: is a recipe right, and what should its user know? Loads no model without
``--run``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigrpo_core.catalog import load_catalog
from unigrpo_core.cli.installed import Catalogs, warned
from unigrpo_core.cli.text import add_json, add_set, as_json
from unigrpo_core.errors import PluginError, UserError
from unigrpo_core.recipe import (
    Origin,
    Problem,
    RecipeError,
    Resolved,
    find_recipe,
    load_recipe,
)
from unigrpo_core.workload import PROMPT_TOKENS

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from unigrpo_core.engine.selfcheck import Finding


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "check",
        help="check recipes without loading a model",
        description="Checks recipes without loading a model; with --run also by one step of each, "
        "of which nothing is kept.",
    )
    parser.add_argument("recipe", nargs="+", metavar="RECIPE", help="a file, or a shipped recipe")
    parser.add_argument(
        "--run",
        action="store_true",
        help="load the model and take one step: is what is sampled what is trained, and does it "
        "learn from it?",
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="print what a step takes: memory by part, network calls, FLOPs",
    )
    parser.add_argument(
        "--prompt-tokens",
        metavar="N",
        type=_count,
        default=PROMPT_TOKENS,
        help="with --memory: tokens of a prompt, system prompt included (default: %(default)s)",
    )
    add_set(parser)
    add_json(parser)
    parser.set_defaults(handler=check)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"should be a number of tokens from 1 on, got {text!r}")
    return int(text)


def check(arguments: argparse.Namespace) -> int:
    catalogs = Catalogs(warned(load_catalog()))
    reports = []
    for word in arguments.recipe:
        report = _report(word, catalogs, arguments.set)
        if not arguments.json:
            print(report, flush=True)
        if arguments.memory and report.resolved is not None:
            report = _memory(report, report.resolved, arguments)
        if arguments.run and report.resolved is not None:
            report = _run(report, report.resolved, quiet=arguments.json)
        reports.append(report)
    if arguments.json:
        print(as_json([report.as_json() for report in reports]))
    return min({report.code for report in reports} - {0}, default=0)


def _memory(report: Report, resolved: Resolved, arguments: argparse.Namespace) -> Report:
    """The report with what a step takes, which is said."""
    from unigrpo_core.cli import memory

    try:
        account = memory.take(resolved, arguments.prompt_tokens)
    except UserError as error:
        wrong = isinstance(error, PluginError)
        problem = Problem(Origin(report.file), "policy", str(error), plugin=wrong)
        report = replace(report, code=error.exit_code, problems=(problem,))
        if not arguments.json:
            print(problem, flush=True)
        return report
    if not arguments.json:
        print(f"  {account}" if isinstance(account, str) else memory.as_text(account), flush=True)
    said = {"missing": account} if isinstance(account, str) else memory.as_json(account)
    return replace(report, memory=said)


def _run(report: Report, resolved: Resolved, *, quiet: bool) -> Report:
    """The report with what the self-check finds, which is said as it is found."""
    from unigrpo_core.engine.selfcheck import self_check

    found = []
    for item in self_check(resolved):
        found.append(item)
        if not quiet:
            print(f"  {'fine ' if item.ok else 'WRONG'} {item.name}: {item.figures}", flush=True)
            if item.change and not item.ok:
                print(f"        change {item.change}")
    codes = [item.code for item in found if not item.ok]
    return replace(report, code=min(codes, default=0), found=tuple(found))


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
    found: tuple[Finding, ...] = ()  # by the self-check
    memory: dict[str, Any] | None = None  # what a step takes, if that was asked

    def as_json(self) -> dict[str, Any]:
        recipe = self.resolved
        return {
            "recipe": self.word,
            "file": None if self.file is None else str(self.file),
            "ok": not self.problems and all(item.ok for item in self.found),
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
            "found": [
                {
                    "name": item.name,
                    "ok": item.ok,
                    "figures": item.figures,
                    "change": "" if item.ok else item.change,
                }
                for item in self.found
            ],
            **({} if self.memory is None else {"memory": self.memory}),
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
