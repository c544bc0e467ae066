"""Errors that are the user's to mend. The command line prints them without a traceback.

Exit codes: 1 a run went wrong, 2 a recipe or the usage is wrong, 3 a plugin is at fault.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


class UserError(Exception):
    """Something only the user can mend; the message says what was got, what was expected and
    where to look next. As is, a run that cannot start or go on."""

    exit_code = 1


class UsageError(UserError):
    """The command was called in a way that means nothing."""

    exit_code = 2


class PluginError(UserError):
    """A plugin is missing, ambiguous, broken, or returned what its interface does not allow."""

    exit_code = 3


def shown(file: Path) -> str:
    """The file as people read it: relative to the working directory when it lies below."""
    relative = os.path.relpath(file)
    return str(file) if relative.startswith("..") else relative


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The end of a message: the nearest known word, or all of them when none is near."""
    from difflib import get_close_matches

    lower = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), lower, n=1)
    if near:
        return f"; did you mean {lower[near[0]]!r}?"
    return f"; there are: {', '.join(known)}" if known else ""
