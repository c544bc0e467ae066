"""What a run writes into its folder before it is finished; anything else there is not its own."""

from __future__ import annotations

import re
from pathlib import Path

from unigrpo_core.loading import PLUGIN_FILE

PART = re.compile(r"(^|/)\.part-")  # what is not whole yet
FOLDERS = re.compile(r"sheets|tensorboard|final(/.+)?")
FILES = re.compile(
    rf"run\.json|recipe\.toml|{re.escape(PLUGIN_FILE)}|(metrics|timing|evaluation)\.jsonl"
    r"|sheets/(step-\d+|before-after)\.png|tensorboard/events\.out\.tfevents\.[^/]+"
    r"|final/(.+/)?([^/]+\.(safetensors|json|bin|model)|(merges|vocab)\.txt)"
)
"""By their paths from the run's folder. The weights in ``final`` are as their policy saves them."""


def foreign(folder: Path) -> Path | None:
    """The first thing in the folder of an unfinished run, at any depth, that no run has written.

    Raises:
        OSError: the folder cannot be read.
    """
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder).as_posix()
        known = FOLDERS if path.is_dir() and not path.is_symlink() else FILES
        if not known.fullmatch(PART.sub(r"\1", inner)) and inner != ".part-summary.json":
            return path
    return None
