"""Runs the jobs of an ablation, some at a time, each in a process of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from unigrpo_core.ablation.jobs import Job
from unigrpo_core.ablation.places import changed, clear, state, unmark
from unigrpo_core.ablation.reading import damage, read_json
from unigrpo_core.errors import UserError, shown

CHILD = (sys.executable, "-P", "-m", "unigrpo_core.ablation.child")
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
PAUSE = 0.05  # seconds between looks at the processes
GRACE = 10.0  # seconds that a process has to end
ROOM = 65536  # bytes free on a disk that is not full
LAST = 2  # lines of a log that a message shows


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen[bytes]
    since: float


class Schedule:
    """Runs what is not finished of ``jobs``, ``slots`` at a time, each once the run that it starts
    from is finished. ``held`` are file descriptors that the processes keep open. ``say`` gets a
    line whenever something happens. ``lost`` holds why a run did not come to its end."""

    def __init__(
        self,
        jobs: Sequence[Job],
        finished: Sequence[Job],
        slots: int,
        held: Sequence[int],
        say: Callable[[str], None],
    ) -> None:
        self.jobs, self.slots, self.held, self.say = jobs, slots, held, say
        self.finished = [job.folder for job in finished]
        self.waiting = [job for job in jobs if job.folder not in self.finished]
        self.running: dict[Path, tuple[Job, Running]] = {}
        self.lost: dict[Path, tuple[Job, str]] = {}

    def __call__(self) -> None:
        """Returns when there is nothing left to do. Whatever ends it before ends its processes."""
        try:
            while self.waiting or self.running:
                self._skip()
                while len(self.running) < self.slots and (ready := self._ready()) is not None:
                    self.waiting.remove(ready)
                    self._start(ready)
                time.sleep(PAUSE)
                for job, running in list(self.running.values()):
                    if running.process.poll() is not None:
                        del self.running[job.folder]
                        self._ended(job, running)
        finally:
            self._stop()

    def _ready(self) -> Job | None:
        for job in self.waiting:
            if job.first is None or job.first.folder in self.finished:
                return job
        return None

    def _skip(self) -> None:
        """Gives up the runs whose first stage was lost."""
        for job in list(self.waiting):
            if job.first is not None and job.first.folder in self.lost:
                self.waiting.remove(job)
                self._lose(job, f"skipped: its first stage, {job.first.name}, is not there")
                self._skip()
                return

    def _start(self, job: Job) -> None:
        try:
            job.folder.parent.mkdir(parents=True, exist_ok=True)
            clear(job)
            with job.log.open("wb") as log:
                process = subprocess.Popen(
                    [*CHILD, *job.words()],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **THREADS},
                    pass_fds=tuple(self.held),
                )
        except (OSError, UserError) as error:
            self._lose(job, f"failed: it cannot be started: {error}")
            return
        self.running[job.folder] = job, Running(process, time.monotonic())
        self._say(job, f"started, log {shown(job.log)}")

    def _ended(self, job: Job, running: Running) -> None:
        assert running.process.stdin is not None
        running.process.stdin.close()
        code = running.process.returncode
        if code:
            last = f"{_last(job.log)}{_full(job.out)}"
            self._lose(job, f"failed with {_code(code)}: {last}; see {shown(job.log)}")
            return
        try:
            figures = _figures(job)
        except UserError as error:
            self._lose(job, f"failed: {error}; see {shown(job.log)}")
            return
        unmark(job)
        self.finished.append(job.folder)
        seconds = time.monotonic() - running.since
        self._say(job, f"done in {seconds:.0f} s{figures}")

    def _lose(self, job: Job, why: str) -> None:
        self.lost[job.folder] = job, why
        self._say(job, why)

    def _say(self, job: Job, what: str) -> None:
        ended = len(self.finished) + len(self.lost)
        self.say(f"[{ended}/{len(self.jobs)}] {job.name}: {what}")

    def _stop(self) -> None:
        """Ends what runs: a process ends with its standard input."""
        processes = [running.process for _, running in self.running.values()]
        try:
            for process in processes:
                assert process.stdin is not None
                process.stdin.close()
            for process in processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()


def _code(code: int) -> str:
    """An exit code in words."""
    if code > 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"{name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


def _last(log: Path) -> str:
    """The last lines of a log as one."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"its log cannot be read: {error.strerror}"
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-LAST:]) or "it has said nothing"


def _full(out: Path) -> str:
    """The end of a message where a log may have lost its last lines."""
    try:
        full = shutil.disk_usage(out).free < ROOM
    except OSError:
        full = False
    return " (the disk is full)" if full else ""


def _figures(job: Job) -> str:
    """The first metric of a finished run, before and after.

    Raises:
        UserError: what was run is not the job, or is not finished.
    """
    if change := changed(job):
        raise UserError(f"the recipe was changed meanwhile: {change}")
    if state(job) != "finished":
        raise UserError("it has left no summary.json")
    file = job.folder / "summary.json"
    found = read_json(file)
    with damage(file):
        before, after = found.get("before", {}), found.get("after", {})
        name = next((key for key in before if key in after), None)
        return "" if name is None else f", {name} {before[name]:.3f} > {after[name]:.3f}"
