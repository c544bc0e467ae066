"""What stands in the folder of an ablation, and who may write there."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from unigrpo_core.ablation.jobs import Job, counted
from unigrpo_core.ablation.reading import damage, read_json
from unigrpo_core.ablation.written import foreign
from unigrpo_core.errors import UserError, shown
from unigrpo_core.loading import PLUGIN_FILE
from unigrpo_core.recipe import toml_value

try:
    import fcntl
except ImportError:  # Windows: two calls at once are not found out there
    fcntl = None  # type: ignore[assignment]

State = Literal["new", "unfinished", "finished"]

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
        if change := changed(job):
            raise _taken(folder, f"its run is another: {change}")
        if "summary.json" in names:
            _check_first(job)
            return "finished"
    elif not names:
        return "new"
    elif not os.path.lexists(job.mark):
        raise _taken(folder, "it is no run's folder: it holds no run.json")
    _check_ours(job)
    return "unfinished"


def clear(job: Job) -> None:
    """Makes the place of a run free, and sets its mark: what a kill leaves of its folder is then
    known as ours.

    Raises:
        UserError: something has come into its place that is not ours.
        OSError: it cannot be removed, or the mark cannot be set.
    """
    if state(job) == "unfinished":
        shutil.rmtree(job.folder)
    job.mark.touch()


def unmark(job: Job) -> None:
    with suppress(OSError):
        job.mark.unlink(missing_ok=True)


def changed(job: Job) -> str:
    """How the run in the folder differs from that of the job; empty if it is the same.

    Raises:
        UserError: its ``run.json`` cannot be read.
    """
    file = job.folder / "run.json"
    about = read_json(file)
    with damage(file):
        theirs = counted(about["values"])
        was = str((about.get("plugin_file") or {}).get("sha256", ""))
    ours = counted(job.values)
    if job.first is not None:
        ours["start"] = str(job.first.folder.absolute())
        if _one_place(Path(str(theirs.get("start"))), job.first.folder):
            theirs["start"] = ours["start"]
    if job.cell.plugin_file != was:
        ours |= {PLUGIN_FILE: job.cell.plugin_file[:12]}
        theirs |= {PLUGIN_FILE: was[:12]}
    differ = [
        f"{key} is {_shown(theirs, key)} there and {_shown(ours, key)} here"
        for key in dict.fromkeys((*ours, *theirs))
        if ours.get(key) != theirs.get(key)
    ]
    more = f" and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
    return f"{', '.join(differ[:SHOWN])}{more}"


def _one_place(start: Path, first: Path) -> bool:
    """Whether a run that started from ``start`` started from the folder ``first`` of its ablation,
    which may have been moved as a whole since."""
    return start.parts[-2:] == first.parts[-2:] or start.resolve() == first.resolve()


def _check_first(job: Job) -> None:
    """Raises a UserError unless a finished run started from the first stage that is there."""
    summary, first = read_json(job.folder / "summary.json"), job.first
    if first is None:
        return
    name = first.cell.name
    if state(first) != "finished":
        raise _taken(job.folder, f"it started from a run of {name} that is not there any more")
    here = read_json(first.folder / "run.json").get("hash")
    if summary.get("start_hash", here) != here:  # runs of older versions do not say
        why = f"it started from another run of {name} than the one that is there"
        raise _taken(job.folder, why)


def _check_ours(job: Job) -> None:
    """Raises a UserError unless all of an unfinished run's folder may be removed."""
    folder = job.folder
    if folder.is_symlink():
        raise _taken(folder, "its run is unfinished, and it is a link")
    if not os.path.lexists(job.mark):
        raise _taken(folder, "its run is unfinished, and was not begun by unigrpo ablate")
    try:
        strange = foreign(folder)
    except OSError as error:
        raise UserError(f"{shown(folder)} cannot be read: {error.strerror}") from error
    if strange is not None:
        inner = strange.relative_to(folder)
        raise _taken(folder, f"its run is unfinished, and no run has written its {inner}")


def _taken(path: Path, why: str) -> UserError:
    return UserError(f"{shown(path)} is in the way: {why}; move it, or choose another --out")


def _shown(values: Mapping[str, Any], key: str) -> str:
    return toml_value(values[key]) if key in values else "absent"
