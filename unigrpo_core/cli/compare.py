"""``unigrpo compare``: finished runs as means over seeds, with their uncertainty."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _SubParsersAction

FORMATS = ("table", "markdown", "csv", "json")


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="compare finished runs: means over seeds, intervals, cost, a figure",
        description="Compares finished runs. Runs whose recipes differ only in the seed are one "
        "cell. Shows per cell the mean over its seeds with standard error and bootstrap interval, "
        "paired differences against one cell, proxy against gold, and cost.",
    )
    parser.add_argument(
        "folder",
        nargs="+",
        metavar="DIR",
        type=Path,
        help="a run folder, or a folder below which there are some",
    )
    parser.add_argument(
        "--metric",
        metavar="NAME",
        help="what was evaluated, e.g. board_verifier; default: the monitor of most "
        "cells, else the reward of most",
    )
    parser.add_argument(
        "--against", metavar="CELL", help="subtract this cell; default: joint, else the first"
    )
    parser.add_argument(
        "--at",
        metavar="WHERE",
        default="final",
        help="final (default), best, step:N, seconds:N of training (of the CPU, on a GPU of the "
        "wall), or seconds:min, the most that all cells reach; cpu:N and cpu:min: of CPU runs only",
    )
    parser.add_argument(
        "--proxy", metavar="NAME", help="shown beside the metric; default: what was trained on"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="table", help="what is printed (default: table)"
    )
    parser.add_argument(
        "--figure",
        metavar="FILE",
        action="append",
        default=[],
        type=Path,
        help="draw curves and final values into FILE.svg or FILE.png (repeatable)",
    )
    parser.add_argument(
        "--skip-unfinished", action="store_true", help="leave out runs that are not finished"
    )
    parser.set_defaults(handler=compare)


def compare(arguments: argparse.Namespace) -> int:
    from unigrpo_core.ablation import comparison, data, tables
    from unigrpo_core.ablation.alike import check_world
    from unigrpo_core.ablation.cells import to_cells
    from unigrpo_core.ablation.choice import At
    from unigrpo_core.ablation.figure import check_figures, write_figure
    from unigrpo_core.ablation.reading import read_runs

    at = At.parse(arguments.at)
    check_figures(arguments.figure)
    runs, left_out = read_runs(arguments.folder, arguments.skip_unfinished)
    check_world(runs)
    cells, merged = to_cells(runs)
    found = comparison.compare(
        cells, arguments.metric, arguments.against, at, arguments.proxy, [*left_out, *merged]
    )
    if arguments.format in ("csv", "json"):
        text = data.as_csv(found) if arguments.format == "csv" else data.as_json(found)
    else:
        show = tables.as_text if arguments.format == "table" else tables.as_markdown
        text = show(found, "±" if _takes("±") else "+-")
    print(text if _takes(text) else text.encode("ascii", "backslashreplace").decode())
    if arguments.format == "csv":  # which has no place for them
        for note in found.notes:
            print(f"note: {note}", file=sys.stderr)
    for file in arguments.figure:
        write_figure(found, file)
    return 0


def _takes(text: str) -> bool:
    """Whether the output can show all of the text."""
    try:
        text.encode(sys.stdout.encoding or "utf-8", sys.stdout.errors or "strict")
    except UnicodeEncodeError:
        return False
    return True
