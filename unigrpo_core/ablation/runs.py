"""Finished runs, read from their folders and checked; nothing is written.

What a run folder holds: :mod:`unigrpo_core.engine.folder`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from unigrpo_core.ablation.files import Row, damage, read_json, read_rows
from unigrpo_core.errors import UserError, shown

EARLIER = ("train_cpu_s", "train_wall_s", "network_calls", "tokens")


@dataclass(frozen=True)
class Curve:
    """One metric of one run, at the steps where it was evaluated: its value after ``steps``
    training steps that took ``seconds`` since the first stage began. At least one point."""

    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """A finished run. ``metrics`` and ``timing`` have one row per training step, in order;
    ``evaluations`` begins with step 0 and ends with the last step."""

    folder: Path
    name: str
    values: Mapping[str, Any]
    plugin_file: str  # SHA-256 of the plugin file beside the recipe, empty if there was none
    on_gpu: bool
    earlier: Mapping[str, float]  # what the stages before took, by the keys EARLIER
    evaluations: tuple[Row, ...]
    metrics: tuple[Row, ...]
    timing: tuple[Row, ...]

    @property
    def seed(self) -> int:
        return int(self.values["seed"])

    @property
    def steps(self) -> int:
        return int(self.values["steps"])

    @property
    def staged(self) -> bool:
        """Whether it began with the weights of another run."""
        return bool(self.values.get("start") or self.values.get("after"))

    @property
    def prompts(self) -> tuple[int, ...]:
        """How many held-out prompts were evaluated at the start and at the end."""
        return tuple(int(self.evaluations[at]["prompts"]) for at in (0, -1))

    @property
    def rewards(self) -> tuple[Row, ...]:
        return tuple(self.values.get("rewards", ()))

    @property
    def monitors(self) -> tuple[Row, ...]:
        return tuple(self.values.get("monitors", ()))

    @cached_property
    def metric_names(self) -> tuple[str, ...]:
        """What was evaluated at the start and at the end, views (VIEW:NAME) among it."""
        first, last = self.evaluations[0], self.evaluations[-1]
        return tuple(name for name in first if name in last and name not in ("step", "prompts"))

    @cached_property
    def seconds(self) -> tuple[float, ...]:
        """What the training steps took, one number per step: CPU-seconds of the process, or on a
        GPU the wall seconds for which it was held."""
        return tuple(float(row[_clock(self.on_gpu)]) for row in self.timing)

    @cached_property
    def clock(self) -> tuple[float, ...]:
        """Seconds since the first stage began, after 0, 1, ... steps."""
        start = self.earlier.get(f"train_{_clock(self.on_gpu)}", 0.0)
        return tuple(accumulate(self.seconds, initial=start))

    def curve(self, metric: str) -> Curve | None:
        """The metric over the run; None if it was not evaluated."""
        rows = [row for row in self.evaluations if metric in row]
        if metric not in self.metric_names:
            return None
        steps = tuple(int(row["step"]) for row in rows)
        return Curve(
            steps,
            tuple(self.clock[step] for step in steps),
            tuple(float(row[metric]) for row in rows),
        )

    def total(self, key: str) -> float | None:
        """The sum of a step's metric over all steps; None where a step lacks it. 0 of no step."""
        if any(key not in row for row in self.metrics):
            return None
        return float(sum(row[key] for row in self.metrics))

    def each(self, key: str) -> list[float]:
        """A step's metric, of the steps that have it."""
        return [float(row[key]) for row in self.metrics if key in row]


def read_runs(places: Sequence[Path], skip_unfinished: bool) -> tuple[list[Run], list[str]]:
    """The runs in and below the folders, in the order of places and then of paths, each once; and
    notes on what was left out.

    Raises:
        UserError: a place is no folder or has no run, a run is not finished (unless these are to
            be skipped), or a file is damaged; it names the folder or the file and line.
    """
    folders: dict[Path, Path] = {}
    for place in places:
        found = list(_run_folders(place))
        if not found:
            raise UserError(
                f"{shown(place)} holds no run: expected a run folder (with run.json), or a folder "
                "below which there are some, as unigrpo run and unigrpo ablate leave them"
            )
        folders.update((folder.resolve(), folder) for folder in found)
    runs, notes = [], []
    for folder in folders.values():
        if (folder / "summary.json").exists():
            runs.append(read_run(folder))
        elif skip_unfinished:
            notes.append(f"{shown(folder)} is not finished and left out")
        else:
            raise UserError(
                f"{shown(folder)} is not finished (it has no summary.json): finish it, or leave "
                "it out with --skip-unfinished"
            )
    if not runs:
        raise UserError("no run is finished: there is nothing to compare")
    return runs, notes


def _run_folders(place: Path) -> Iterator[Path]:
    if not place.is_dir():
        raise UserError(f"{shown(place)}: {'is no folder' if place.exists() else 'no such folder'}")

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error

    for folder, below, files in os.walk(place, onerror=refuse):
        if "run.json" in files:
            below.clear()
            yield Path(folder)
        below.sort()


def read_run(folder: Path) -> Run:
    """A finished run.

    Raises:
        UserError: a file is absent, damaged or shorter than the run; it names file and line.
    """
    about, summary = read_json(folder / "run.json"), read_json(folder / "summary.json")
    with damage(folder / "run.json"):
        values = about["values"]
        steps, seed, name = values["steps"], values["seed"], about["recipe"]
        cuda, device = about["environment"]["cuda"], values["compute"]["device"]
        plugin_file = (about.get("plugin_file") or {}).get("sha256", "")
        if not all(isinstance(number, int) for number in (steps, seed)):
            raise TypeError("steps and seed should be whole numbers")
        for row in (*values["rewards"], *values.get("monitors", ())):
            row["use"]
    with damage(folder / "summary.json"):
        before = summary.get("earlier") or {}
        earlier = {key: float(before[key]) for key in EARLIER if before.get(key) is not None}
    on_gpu = cuda is not None and device != "cpu"
    evaluations = read_rows(folder / "evaluation.jsonl", ("prompts",))
    metrics = read_rows(folder / "metrics.jsonl") if steps else ()
    timing = read_rows(folder / "timing.jsonl", (_clock(on_gpu),)) if steps else ()
    for file, rows in (("metrics.jsonl", metrics), ("timing.jsonl", timing)):
        _expect(folder / file, [row["step"] for row in rows] == [*range(1, steps + 1)], steps)
    evaluated = [row["step"] for row in evaluations]
    ordered = evaluated == sorted(set(evaluated))
    edges = bool(evaluated) and (evaluated[0], evaluated[-1]) == (0, steps)
    _expect(folder / "evaluation.jsonl", ordered and edges, steps)
    run = Run(folder, name, values, plugin_file, on_gpu, earlier, evaluations, metrics, timing)
    if not run.metric_names:
        raise UserError(f"{shown(folder / 'evaluation.jsonl')} is damaged: it has no metric")
    return run


def _clock(on_gpu: bool) -> str:
    """The key of a step's time that counts."""
    return "wall_s" if on_gpu else "cpu_s"


def _expect(file: Path, right: bool, steps: int) -> None:
    if not right:
        raise UserError(
            f"{shown(file)} is damaged: its rows are not those of {steps} steps in order; "
            "run it again"
        )
