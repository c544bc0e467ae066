"""What the verbs share: aligned tables, JSON, and ``--set``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any


def table(rows: Sequence[Sequence[str]]) -> str:
    """The rows with their columns aligned; the last column is free."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    lines = (
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def add_set(parser: argparse.ArgumentParser) -> None:
    """``--set PATH=VALUE``, as often as wanted; a list of texts in ``arguments.set``."""
    parser.add_argument(
        "--set",
        metavar="PATH=VALUE",
        action="append",
        default=[],
        help="override one value, e.g. image.lr=1e-5 or image.guidance.use=none (repeatable)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
