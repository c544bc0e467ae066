"""What training has cost, over a run and over those that it started from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cost:
    """Sums over training steps; evaluation is not counted."""

    train_cpu_s: float = 0.0
    train_wall_s: float = 0.0
    network_calls: int = 0  # velocities of one image at one time in one context
    tokens: int = 0  # sampled

    def and_step(self, metrics: Mapping[str, float], timing: Mapping[str, float]) -> Cost:
        return Cost(
            self.train_cpu_s + timing["cpu_s"],
            self.train_wall_s + timing["wall_s"],
            self.network_calls + int(metrics.get("network_calls", 0)),
            self.tokens + int(metrics.get("tokens", 0)),
        )

    def spent(self, budget: str) -> bool:
        """Whether a budget of "cpu:SECONDSs" or "wall:SECONDSs" is used up; never without one."""
        clock, _, seconds = budget.partition(":")
        used = self.train_wall_s if clock == "wall" else self.train_cpu_s
        return bool(budget) and used >= float(seconds.removesuffix("s"))

    def rounded(self) -> dict[str, float]:
        return {name: round(value, 2) for name, value in asdict(self).items()}


COUNTED = ("steps", *(field.name for field in fields(Cost)))


@dataclass(frozen=True)
class Earlier:
    """The run that this one started from: the hash of its recipe, and what it and those before it
    have cost. None where there was none, or its folder does not say."""

    hash: str | None
    cost: Mapping[str, float | None] | None


def earlier_run(start: str) -> Earlier:
    """What the folder ``start`` says of its run."""
    summary = _read(Path(start) / "summary.json") if start else None
    if summary is None:
        return Earlier(None, None)
    return Earlier(summary.get("hash"), {name: _sum(name, summary) for name in COUNTED})


def _sum(name: str, summary: Mapping[str, Any]) -> float | None:
    """A cost of a run and of those before it; None if one of them does not say."""
    parts = [summary, *([summary["earlier"]] if summary.get("earlier") else [])]
    values = [part.get(name) for part in parts]
    return None if None in values else round(sum(values), 2)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
