"""Timing, rows and the budget: everything about a measurement but what is measured.

A case is a function of a :class:`Bench`. It hands over entries, which are warmed up, called in turn
(A, B, A, B, ...), and written as one JSON line each as soon as they are measured. Whatever fails
ends its own entry only.
"""

from __future__ import annotations

import gc
import json
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from unigrpo_models.bagel.accounting import Work

from gpu_checks.rows import NOTHING, Peaks, Timing, rates, short, shown
from unigrpo_core.engine.faults import no_memory


class UnavailableError(Exception):
    """What is asked cannot be measured here; the message says why."""


class TimeLimit(BaseException):
    """A case took longer than it may. No error, so that nothing on the way takes it for one."""


@dataclass(frozen=True)
class Entry:
    """Something to measure. ``work`` is that of one call; a call does ``per`` units, such as
    decoding steps or images, and the row speaks of one of them. ``phase`` is what the projection
    knows it by, if the package itself can run it so."""

    config: str
    run: Callable[[], object]
    work: Work = NOTHING
    per: float = 1.0
    phase: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pace:
    """How long an entry is measured: calls before, calls at least, seconds at most beyond these."""

    warm: int
    least: int
    seconds: float


@dataclass(frozen=True)
class Case:
    """``priority`` 0 is dropped last; ``seconds`` are an estimate."""

    name: str
    run: Callable[[Bench], None]
    priority: int
    seconds: float


class Bench:
    """Where measurements go. ``phases`` has, for every phase, milliseconds by configuration."""

    def __init__(self, device: torch.device, out: Path, pace: Pace, case: str = "") -> None:
        self.device, self.out, self.pace, self.case = device, out, pace, case
        self.peaks: Peaks | None = None
        self.phases: dict[str, dict[str, float]] = {}
        self.failed = 0

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def race(self, *entries: Entry, pace: Pace | None = None) -> None:
        """Measures entries side by side and writes their rows."""
        pace = pace or self.pace
        calls: dict[str, list[float]] = {}
        memory: dict[str, float] = {}
        for entry in entries:
            with self.guarded(entry.config):
                self.forget_peak()
                for _ in range(pace.warm):
                    entry.run()
                calls[entry.config] = []
                memory[entry.config] = self.peak_gb()
        running = [entry for entry in entries if entry.config in calls]
        end = time.perf_counter() + pace.seconds * len(running)
        try:
            turn = 0
            while running and (turn < pace.least or time.perf_counter() < end):
                for entry in list(running):
                    with self.guarded(entry.config) as fine:
                        calls[entry.config].append(self.once(entry.run))
                        fine.append(True)
                    if not fine:
                        running.remove(entry)
                        calls[entry.config] = []
                turn += 1
        finally:
            for entry in entries:
                if calls.get(entry.config):
                    self.measured(entry, calls[entry.config], memory[entry.config])

    def once(self, run: Callable[[], object]) -> float:
        """Milliseconds of a call."""
        if not self.cuda:
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def measured(self, entry: Entry, calls: Sequence[float], peak_gb: float) -> None:
        """The row of an entry whose calls took so many milliseconds each."""
        timing = Timing.of(calls, entry.per)
        if entry.phase:
            self.phases.setdefault(entry.phase, {})[entry.config] = timing.median
        work = entry.work * (1 / entry.per)
        self.write(
            config=entry.config,
            status="ok",
            ms=timing.median,
            p10=timing.p10,
            p90=timing.p90,
            calls=timing.calls,
            **rates(work, timing.median, self.peaks),
            peak_gb=peak_gb,
            **entry.extra,
        )

    def skip(self, config: str, reason: str) -> None:
        self.write(config=config, status="skipped", reason=reason)

    @contextmanager
    def guarded(self, config: str) -> Iterator[list[bool]]:
        """A failure inside becomes a row; the body appends to what is yielded if it is fine."""
        fine: list[bool] = []
        try:
            yield fine
        except UnavailableError as reason:
            self.skip(config, str(reason))
        except Exception as error:
            if no_memory(error):
                self.skip(config, f"out of memory: {_first_line(error)}")
                error.__traceback__ = None  # whose frames hold what was allocated
                if self.cuda:
                    torch.cuda.empty_cache()
            else:
                self.failed += 1
                reason = f"{type(error).__name__}: {_first_line(error)}"
                self.write(config=config, status="error", reason=reason)

    def write(self, **row: Any) -> None:
        """Appends a row."""
        line = {"case": self.case, **{name: short(value) for name, value in row.items()}}
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(shown(line), flush=True)

    def forget_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gb(self) -> float:
        """Peak of the device's memory since it was forgotten; on a CPU of the whole process."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def run(self, cases: Sequence[Case], budget: float) -> None:
        """Runs the cases in their order. Before each, as long as what is left does not fit in what
        is left of the budget (seconds), the least important is dropped."""
        end = time.perf_counter() + budget
        waiting = list(cases)
        while waiting:
            left = end - time.perf_counter()
            while waiting and sum(case.seconds for case in waiting) > left:
                dropped = max(waiting, key=lambda case: case.priority)
                waiting.remove(dropped)
                self.case = dropped.name
                self.skip("", f"budget: about {dropped.seconds:.0f} s, and {left:.0f} s are left")
            if waiting:
                self._run(waiting.pop(0), left)

    def _run(self, case: Case, left: float) -> None:
        self.case = case.name
        limit = min(left, max(30.0, 3 * case.seconds))
        try:
            with self.guarded(""), time_limit(limit):
                case.run(self)
        except TimeLimit:
            self.skip("", f"time limit: {limit:.0f} s")
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeLimit in the main thread when the seconds are over."""

    def ring(*_: object) -> None:
        raise TimeLimit

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:300]
