"""``unigrpo ablate``: runs a grid of recipes, axes and seeds, and goes on where it was stopped."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unigrpo_core.catalog import load_catalog
from unigrpo_core.cli.installed import Catalogs, warned
from unigrpo_core.cli.text import add_set
from unigrpo_core.errors import UsageError, UserError, shown

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from unigrpo_core.ablation.jobs import Job
    from unigrpo_core.ablation.places import State

WORDS = {"new": "to run", "unfinished": "to run again: it is unfinished", "finished": "finished"}


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "ablate",
        help="run recipes x axes x seeds, some at a time",
        description="Runs every recipe with every value of every axis and every seed, each run in "
        "a process of one thread. Finished runs are not made again, so the same command goes on "
        "where it was stopped. A run that fails is reported and the others go on.",
    )
    parser.add_argument("recipe", nargs="+", metavar="RECIPE", help="a file, or a shipped recipe")
    parser.add_argument(
        "--axis",
        metavar="KEY=V,V,...",
        action="append",
        default=[],
        help="the values of a key in turn, e.g. image.regularizers.0.weight=0,.005,.01 "
        "(repeatable: every combination)",
    )
    parser.add_argument(
        "--seeds", metavar="S,S,...", default="0", help="seeds of every cell; default: 0"
    )
    parser.add_argument("--jobs", metavar="N", default="1", help="runs at a time; default: 1")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs", "ablate"),
        help="the runs become DIR/CELL/seed-S; default: runs/ablate",
    )
    parser.add_argument(
        "--budget",
        metavar="CLOCK:Ns",
        help="seconds of training that every run ends after, if its steps have not, of the CPU or "
        "of the wall: cpu:120s (short for --set budget=...)",
    )
    add_set(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="list the runs and what is done of them; run none"
    )
    parser.set_defaults(handler=ablate)


def ablate(arguments: argparse.Namespace) -> int:
    from unigrpo_core.ablation.grid import grid, parse_seeds
    from unigrpo_core.ablation.jobs import Job
    from unigrpo_core.ablation.notes import notes
    from unigrpo_core.ablation.places import locked, unmark
    from unigrpo_core.ablation.schedule import Schedule

    seeds, slots, out = parse_seeds(arguments.seeds), _slots(arguments.jobs), arguments.out
    catalogs = Catalogs(warned(load_catalog()))
    budget = [f"budget={arguments.budget}"] if arguments.budget else []
    cells = grid(arguments.recipe, arguments.axis, [*budget, *arguments.set], catalogs.of)
    jobs = [Job(cell, seed, out) for seed in seeds for cell in cells]
    counted = f"{_many(len(cells), 'cell')} x {_many(len(seeds), 'seed')}"
    if arguments.dry_run:
        states = _states(jobs)
        print(f"{counted} = {_many(len(jobs), 'run')} in {shown(out)}")
        for note in notes(cells):
            print(f"note: {note}")
        for job, state in zip(jobs, states, strict=True):
            waits = f", after {job.first.name}" if job.first and state != "finished" else ""
            print(f"{job.name}: {WORDS[state]}{waits}")
        return 0
    say = _Voice()
    with locked(out) as held:
        states = _states(jobs)
        finished = [job for job, state in zip(jobs, states, strict=True) if state == "finished"]
        already = f", {len(finished)} finished already" if finished else ""
        say(f"{counted} = {_many(len(jobs), 'run')}{already}, {slots} at a time")
        for note in notes(cells):
            say(f"note: {note}")
        for job in finished:
            unmark(job)
        schedule = Schedule(jobs, finished, slots, held, say)
        try:
            schedule()
        except BaseException as error:
            done = f"{len(schedule.finished)} of {_many(len(jobs), 'run')}"
            error.add_note(f"{shown(out)} keeps {done}; the same command goes on from there")
            raise
    lost = list(schedule.lost.values())
    done = f"{len(schedule.finished)} of {_many(len(jobs), 'run')} finished"
    say(f"{done}; CPU time of these runs, evaluation included: {_cpu(schedule.finished)}")
    for job, why in lost:
        say(f"  {job.name}: {why}")
    if lost:
        say("the same command tries these again")
    say(f"results: {shown(out)}; compare them with: unigrpo compare {shlex.quote(shown(out))}")
    if say.broken is not None:
        say.broken.add_note(f"that stopped no run: {done}; {shown(out)} keeps them and their logs")
        raise say.broken
    return 1 if lost else 0


def _states(jobs: Sequence[Job]) -> list[State]:
    """The state of every run's folder.

    Raises:
        UserError: with all that is in the way.
    """
    from unigrpo_core.ablation.places import state

    states, problems = [], []
    for job in jobs:
        try:
            states.append(state(job))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return states


def _cpu(folders: Sequence[Path]) -> str:
    """The CPU time of whole runs, where each says what it took."""
    from unigrpo_core.ablation.reading import read_json

    spent = [read_json(folder / "summary.json").get("cpu_s") for folder in folders]
    known = [seconds for seconds in spent if seconds is not None]
    unknown = f" ({len(spent) - len(known)} do not say)" if len(known) < len(spent) else ""
    return f"{sum(known) / 60:.1f} min{unknown}"


def _slots(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise UsageError(f"--jobs {text}: expected how many runs at a time, such as 2")
    return int(text)


def _many(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


class _Voice:
    """Prints lines. A standard output that fails, be it a full disk or a closed pipe, stops no run:
    the first error is kept in ``broken``."""

    def __init__(self) -> None:
        self.broken: OSError | None = None

    def __call__(self, line: str) -> None:
        try:
            print(line, flush=True)
        except OSError as error:
            self.broken = self.broken or error
