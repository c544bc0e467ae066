"""The command line: one file per verb. Nothing here imports torch before a verb asks for it."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from unigrpo_core.cli import ablate, check, compare, plugins, run, sample, show
from unigrpo_core.errors import UserError

VERBS = (run, check, show, plugins, sample, ablate, compare)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code: 0, or 1 a run went wrong, 2 a recipe or the usage
    is wrong, 3 a plugin is at fault, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.handler(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        _say(error, str(error), arguments.debug)
        return error.exit_code
    except KeyboardInterrupt as error:
        _say(error, "interrupted", arguments.debug)
        return 130
    except BrokenPipeError:  # whoever read our output has had enough, as in `unigrpo show | head`
        _drop_output()
        return 141
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _say(error, f"what is printed cannot be written: {error.strerror}", arguments.debug)
            _drop_output()
            return 1
        what = " ".join(f"{type(error).__name__}: {error}".split())
        told = f"a bug, please report it: {what} (--debug shows the traceback)"
        _say(error, told, arguments.debug)
        return 1


def _drop_output() -> None:
    """What is printed from now on, or waits to be, goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(error: BaseException, told: str, debug: bool) -> None:
    """Prints what went wrong and the notes on it, such as where a run has left its folder."""
    notes = getattr(error, "__notes__", ())
    lines = traceback.format_exception(error) if debug else ["\n".join((told, *notes)), "\n"]
    print("".join(lines), end="", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unigrpo", description="Train models that think before they draw."
    )
    debug = "show the traceback of an error"
    parser.add_argument("--debug", action="store_true", help=debug)
    parser.add_argument("--version", action="version", version=f"unigrpo {_version()}")
    subparsers = parser.add_subparsers(metavar="VERB", required=True)
    for verb in VERBS:
        verb.register(subparsers)
    for verb_parser in subparsers.choices.values():
        verb_parser.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=debug
        )
    return parser


def _version() -> str:
    try:
        return version("unigrpo")
    except PackageNotFoundError:
        return "(not installed)"
