"""What is measured of a cell: a metric where it is asked for, means over steps, and what the runs
took."""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum
from typing import Literal

from unigrpo_core.ablation.cells import Cell
from unigrpo_core.ablation.choice import At
from unigrpo_core.ablation.runs import Curve, Run
from unigrpo_core.ablation.statistics import Estimate, between, estimate

# --- metrics ----------------------------------------------------------------------------------


def best_of(cell: Cell, metric: str) -> int:
    """The evaluation, by number, at which the mean over the seeds is highest, the first of equal
    ones."""
    curves = [curve for run in cell.runs if (curve := run.curve(metric))]
    sums = [fsum(values) for values in zip(*(curve.values for curve in curves), strict=True)]
    return sums.index(max(sums))


def values_at(cell: Cell, metric: str, at: At) -> dict[int, float] | None:
    """By seed, the metric where it is asked for; None if a run of the cell does not have it there.

    Between two evaluations it is interpolated linearly, unless the metric is evaluated at the
    start and the end only. A run of 0 steps stays as it is.
    """
    found: dict[int, float] = {}
    if any(run.curve(metric) is None for run in cell.runs):
        return None
    edge = best_of(cell, metric) if at.kind == "best" else -1 if at.kind == "final" else None
    for run in cell.runs:
        curve = run.curve(metric)
        assert curve is not None
        if edge is not None or not run.steps:
            value: float | None = curve.values[-1 if edge is None else edge]
        else:
            value = _at(run, curve, at)
        if value is None:
            return None
        found[run.seed] = value
    return found


def _at(run: Run, curve: Curve, at: At) -> float | None:
    places = curve.steps if at.kind == "step" else curve.seconds
    if places is None or (at.where not in places and len(curve.steps) < len(run.evaluations)):
        return None
    return between(places, curve.values, at.where)


def means(cell: Cell, key: str) -> Estimate | None:
    """The mean over the steps that have the metric, if every run has some."""
    found = [run.each(key) for run in cell.runs]
    return estimate([sum(row) / len(row) for row in found]) if all(found) else None


# --- cost -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a run of the cell took, the stages before it included; None where it was not counted in
    all of them. ``seconds`` are of training alone, on the device that ``unit`` says. ``staged``:
    whether there were stages before."""

    unit: Literal["cpu", "gpu"]
    seconds: Estimate | None
    network_calls: Estimate | None
    calls_per_image: Estimate | None
    tokens: Estimate | None
    staged: bool


def cost_of(cell: Cell) -> Cost:
    """The means over the cell's seeds."""
    return Cost(
        "gpu" if cell.runs[0].on_gpu else "cpu",
        _mean([run.clock[-1] if run.clock else None for run in cell.runs]),
        _mean([_total(run, "network_calls") for run in cell.runs]),
        means(cell, "calls_per_image"),
        _mean([_total(run, "tokens") for run in cell.runs]),
        any(run.staged for run in cell.runs),
    )


def _mean(totals: list[float | None]) -> Estimate | None:
    known = [total for total in totals if total is not None]
    return estimate(known) if len(known) == len(totals) else None


def _total(run: Run, key: str) -> float | None:
    """Of a run and the stages before it."""
    own, before = run.total(key), run.before(key)
    return None if own is None or before is None else own + before
