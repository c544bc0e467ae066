"""What stands in the folder of an ablation, and who may write there."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from unigrpo_core.ablation.jobs import Job
from unigrpo_core.errors import UserError, shown
from unigrpo_core.loading import PLUGIN_FILE
from unigrpo_core.recipe import toml_value
from unigrpo_core.recipe.emit import leaves
from unigrpo_core.recipe.resolve import ASIDE

try:
    import fcntl
except ImportError:  # Windows: two calls at once are not found out there
    fcntl = None  # type: ignore[assignment]

State = Literal["new", "unfinished", "finished"]

WRITTEN = frozenset(
    {
        "run.json",
        "recipe.toml",
        PLUGIN_FILE,
        "metrics.jsonl",
        "timing.jsonl",
        "evaluation.jsonl",
        "tensorboard",
        "sheets",
        "final",
    }
)
"""What a run writes at the top of its folder before its summary."""
LOCK = ".ablate.lock"
PATIENCE = 5.0  # seconds in which the runs of a call that was killed end
SHOWN = 3  # keys that a message shows at most


@contextmanager
def locked(out: Path) -> Iterator[tuple[int, ...]]:
    """Around all work in ``out``, which is made. Yields the file descriptors that its runs hold
    too, so that the folder is free only when the last of them has ended.

    Raises:
        UserError: another call works there, or the folder cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{shown(out)} cannot be written: {why}; choose another --out") from error
    try:
        if fcntl is None:
            yield ()
        else:
            _take(lock, out)
            yield (lock,)
    finally:
        os.close(lock)


def _take(lock: int, out: Path) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise UserError(
                    f"another `unigrpo ablate` works in {shown(out)}; wait for its end, or choose "
                    "another folder with --out"
                ) from None
        except OSError as error:
            raise UserError(f"{shown(out)} cannot be locked: {error.strerror}") from error
        time.sleep(0.05)


def state(job: Job) -> State:
    """Whether a run is still to be made, was begun and left, or is finished.

    Raises:
        UserError: something else stands in its place.
    """
    folder = job.folder
    try:
        if not os.path.lexists(folder):
            if os.path.lexists(folder.parent) and not folder.parent.is_dir():
                raise _taken(folder.parent, "it is no folder")
            return "new"
        if not folder.is_dir():
            raise _taken(folder, "it is no folder")
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise UserError(f"{shown(folder)} cannot be read: {error.strerror}") from error
    if "run.json" in names:
        _same(job)
        if "summary.json" in names:
            summary(folder)
            return "finished"
    elif not names:
        return "new"
    elif not os.path.lexists(job.mark):
        raise _taken(folder, "it is no run's folder: it holds no run.json")
    foreign = sorted(n for n in names - WRITTEN if not n.startswith(".part-"))
    if foreign:
        raise _taken(folder, f"its run is unfinished, and no run has written its {foreign[0]}")
    if folder.is_symlink():
        raise _taken(folder, "its run is unfinished, and it is a link")
    return "unfinished"


def clear(job: Job) -> None:
    """Makes the place of an unfinished run free. Its mark is set first: what a kill leaves of the
    folder is then still known as ours."""
    job.mark.touch()
    if job.folder.is_dir() and any(job.folder.iterdir()):
        shutil.rmtree(job.folder)


def unmark(job: Job) -> None:
    with suppress(OSError):
        job.mark.unlink(missing_ok=True)


def summary(folder: Path) -> dict[str, Any]:
    """A finished run's ``summary.json``.

    Raises:
        UserError: it cannot be read.
    """
    return _read(folder / "summary.json")


def _taken(path: Path, why: str) -> UserError:
    return UserError(f"{shown(path)} is in the way: {why}; move it, or choose another --out")


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = (isinstance(error, OSError) and error.strerror) or "it is no JSON text"
        raise UserError(f"{shown(file)} cannot be read: {why}") from error
    if not isinstance(found, dict):
        raise UserError(f"{shown(file)} cannot be read: it holds no object")
    return found


def _same(job: Job) -> None:
    """Raises a UserError unless the run in the folder is that of the job."""
    found = _read(job.folder / "run.json")
    theirs = found.get("values")
    if not isinstance(theirs, dict):
        raise _taken(job.folder, "its run.json is not one of a run")
    ours, theirs = _counted(job, job.values), _counted(job, theirs)
    was = (found.get("plugin_file") or {}).get("sha256", "")
    if job.cell.plugin_file != was:
        ours |= {PLUGIN_FILE: job.cell.plugin_file[:12]}
        theirs |= {PLUGIN_FILE: was[:12]}
    differ = [
        f"{key} is {_shown(theirs, key)} there and {_shown(ours, key)} here"
        for key in dict.fromkeys((*ours, *theirs))
        if ours.get(key) != theirs.get(key)
    ]
    if differ:
        more = f" and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
        raise _taken(job.folder, f"its run is another: {', '.join(differ[:SHOWN])}{more}")


def _counted(job: Job, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that make the run, by dotted path."""
    aside = (*ASIDE, "start") if job.first else ASIDE
    kept = {key: value for key, value in values.items() if key not in aside}
    return {".".join(map(str, path)): value for path, value in leaves(kept)}


def _shown(values: Mapping[str, Any], key: str) -> str:
    return toml_value(values[key]) if key in values else "absent"
