"""What a finished run says of itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from unigrpo_core.engine.cuts import is_cut
from unigrpo_core.recipe.scored import score_names

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """One metric of one run, at the steps where it was evaluated: its value after ``steps``
    training steps that took ``seconds`` since the first stage began, None if these are not known.
    At least one point."""

    steps: tuple[int, ...]
    seconds: tuple[float, ...] | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """A finished run. ``metrics`` and ``timing`` have one row per training step, in order;
    ``evaluations`` begins with step 0 and ends with the last step."""

    folder: Path
    name: str
    values: Mapping[str, Any]
    plugin_file: str  # SHA-256 of the plugin file beside the recipe, empty if there was none
    plugins: Mapping[str, str]  # version by distribution
    on_gpu: bool
    earlier: Mapping[str, float]  # what the stages before took: of COUNTED what is on record
    evaluations: tuple[Row, ...]
    metrics: tuple[Row, ...]
    timing: tuple[Row, ...]

    @property
    def seed(self) -> int:
        return int(self.values["seed"])

    @property
    def steps(self) -> int:
        """Those that were made: the recipe's, or as far as its budget went."""
        return len(self.metrics)

    @property
    def staged(self) -> bool:
        """Whether it began with the weights of another run."""
        return bool(self.values.get("start") or self.values.get("after"))

    @property
    def stage_before(self) -> str:
        """What it began with, the same for all seeds: the stem of the recipe that made it, or the
        folder of all its seeds. Empty from scratch."""
        after, start = self.values.get("after"), self.values.get("start")
        if after:
            return Path(after).stem
        if not start:
            return ""
        folder = Path(start)
        return str(folder.parent if re.fullmatch(r"seed-\d+", folder.name) else folder)

    def before(self, key: str) -> float | None:
        """What the stages before took, 0 where there were none; None if that is not on record."""
        return self.earlier.get(key) if self.staged else 0.0

    @property
    def prompts(self) -> tuple[int, ...]:
        """How many held-out prompts were evaluated at the start and at the end."""
        return tuple(int(self.evaluations[at]["prompts"]) for at in (0, -1))

    @cached_property
    def scores(self) -> Mapping[str, Row]:
        """The slots of its rewards and monitors, by what their metrics are called."""
        return {name: slot for name, (slot, _) in score_names(self.values).items()}

    @property
    def trained_on(self) -> tuple[str, ...]:
        """The rewards whose weight is not 0."""
        found = score_names(self.values).items()
        return tuple(n for n, (slot, kind) in found if kind == "reward" and slot.get("weight", 1.0))

    @property
    def monitored(self) -> tuple[str, ...]:
        """The monitors, and the rewards that are monitors too."""
        own = self.values.get("monitors", ())
        return tuple(
            name
            for name, slot in self.scores.items()
            if {key: value for key, value in slot.items() if key != "weight"} in own
        )

    @cached_property
    def metric_names(self) -> tuple[str, ...]:
        """What was evaluated at the start and at the end, views (VIEW:NAME) among it."""
        first, last = self.evaluations[0], self.evaluations[-1]
        scores = [n for n in first if n not in ("step", "prompts") and not is_cut(n)]
        return tuple(name for name in scores if name in last)

    @cached_property
    def seconds(self) -> tuple[float, ...]:
        """What the training steps took, one number per step: CPU-seconds of the process, or on a
        GPU the wall seconds for which it was held."""
        return tuple(float(row[clock_of(self.on_gpu)]) for row in self.timing)

    @cached_property
    def clock(self) -> tuple[float, ...] | None:
        """Seconds since the first stage began, after 0, 1, ... steps; None if those of the stages
        before are not on record."""
        start = self.before(f"train_{clock_of(self.on_gpu)}")
        return None if start is None else tuple(accumulate(self.seconds, initial=start))

    def curve(self, metric: str) -> Curve | None:
        """The metric over the run; None if it was not evaluated. Of a run that ended with its
        budget, which is at another step for every seed, the start and the end."""
        rows = [row for row in self.evaluations if metric in row]
        if self.values.get("budget"):
            rows = [*rows[:1], *rows[1:][-1:]]
        if metric not in self.metric_names:
            return None
        steps = tuple(int(row["step"]) for row in rows)
        return Curve(
            steps,
            self.clock and tuple(self.clock[step] for step in steps),
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


def clock_of(on_gpu: bool) -> str:
    """The key of a step's time that counts."""
    return "wall_s" if on_gpu else "cpu_s"
