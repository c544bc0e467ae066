"""What training has cost, over a run and over those that it started from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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

    def rounded(self) -> dict[str, float]:
        return {name: round(value, 2) for name, value in asdict(self).items()}


COUNTED = ("steps", "train_cpu_s", "train_wall_s", "network_calls", "tokens")


def earlier_cost(start: str) -> dict[str, float] | None:
    """The cost of the run in folder ``start`` and of those before it; None if there is none, or
    none is on record."""
    try:
        summary: Any = json.loads((Path(start) / "summary.json").read_text()) if start else None
    except (OSError, ValueError):
        return None
    if not isinstance(summary, dict):
        return None
    parts = [summary, summary.get("earlier") or {}]
    return {name: round(sum(part.get(name) or 0 for part in parts), 2) for name in COUNTED}
