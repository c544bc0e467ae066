"""What a row says: times, rates, floors and shares."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from unigrpo_models.bagel.accounting import Work

NOTHING = Work()
PLAIN = frozenset(
    {
        *("case", "config", "status", "ms", "p10", "p90", "calls", "peak_gb"),
        *("flop", "gb", "tflop_s", "gb_s", "floor_ms", "share_burst", "share_sustained"),
    }
)
"""What every measured row has."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds per unit of work, over ``calls`` calls."""

    median: float
    p10: float
    p90: float
    calls: int

    @classmethod
    def of(cls, calls: Sequence[float], per: float) -> Timing:
        low, middle, high = np.percentile(np.asarray(calls) / per, (10, 50, 90))
        return cls(float(middle), float(low), float(high), len(calls))


@dataclass(frozen=True)
class Peaks:
    """What the machine reaches: FLOP/s in a burst and sustained, and bytes/s."""

    burst: float
    sustained: float
    bandwidth: float


def rates(work: Work, ms: float, peaks: Peaks | None) -> dict[str, float | None]:
    """What a row says of ``work`` done in ``ms``: amounts, rates, the floor on this machine, and
    which share of the measured time the floors by the burst and the sustained peak are."""
    seconds = ms / 1e3
    found: dict[str, float | None] = {
        "flop": work.flops,
        "gb": work.bytes / 1e9,
        "tflop_s": work.flops / seconds / 1e12 if work.flops else None,
        "gb_s": work.bytes / seconds / 1e9 if work.bytes else None,
        "floor_ms": None,
        "share_burst": None,
        "share_sustained": None,
    }
    if peaks is not None and work != NOTHING:
        burst = work.seconds(peaks.burst, peaks.bandwidth)
        sustained = work.seconds(peaks.sustained, peaks.bandwidth)
        found["floor_ms"] = 1e3 * burst
        found["share_burst"], found["share_sustained"] = burst / seconds, sustained / seconds
    return found


def shown(row: Mapping[str, Any]) -> str:
    """A row for people."""
    head = f"{row['case']} | {row.get('config') or '-'}"
    if row.get("status") != "ok":
        rest = {k: v for k, v in row.items() if k not in ("case", "config", "status")}
        told = rest.pop("reason", None) or json.dumps(rest)
        return f"{head} | {row.get('status') or 'note'} | {told}"
    share = row["share_burst"]
    more = {name: value for name, value in row.items() if name not in PLAIN}
    parts = [
        f"{row['ms']:.4g} ms ({row['p10']:.4g}-{row['p90']:.4g})",
        row["tflop_s"] and f"{row['tflop_s']:.4g} TFLOP/s",
        row["gb_s"] and f"{row['gb_s']:.4g} GB/s",
        share and f"{share:.0%} of burst, {row['share_sustained']:.0%} of sustained",
        f"{row['peak_gb']:.3g} GB",
        json.dumps(more) if more else "",
    ]
    return " | ".join([head, *filter(None, parts)])


def short(value: Any) -> Any:
    """Floats to 6 digits, and no NaN, which JSON lacks."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: short(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [short(inner) for inner in value]
    return value
