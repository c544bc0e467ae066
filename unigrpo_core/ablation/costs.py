"""What the runs of a cell took, and means over their steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unigrpo_core.ablation.cells import Cell
from unigrpo_core.ablation.runs import Run
from unigrpo_core.ablation.statistics import Estimate, estimate


@dataclass(frozen=True)
class Cost:
    """What a run of the cell took, the stages before it included; None where it was not counted.
    ``seconds`` are of training alone, on the device that ``unit`` says. ``staged``: whether there
    were stages before."""

    unit: Literal["cpu", "gpu"]
    seconds: Estimate
    network_calls: Estimate | None
    calls_per_image: Estimate | None
    tokens: Estimate | None
    staged: bool


def cost_of(cell: Cell) -> Cost:
    """The means over the cell's seeds."""
    return Cost(
        "gpu" if cell.runs[0].on_gpu else "cpu",
        estimate([run.clock[-1] for run in cell.runs]),
        _totals(cell, "network_calls"),
        means(cell, "calls_per_image"),
        _totals(cell, "tokens"),
        any(run.earlier for run in cell.runs),
    )


def _totals(cell: Cell, key: str) -> Estimate | None:
    totals = [_total(run, key) for run in cell.runs]
    known = [total for total in totals if total is not None]
    return estimate(known) if len(known) == len(totals) else None


def _total(run: Run, key: str) -> float | None:
    """Of a run and the stages before it."""
    own = run.total(key)
    before = run.earlier.get(key) if run.earlier else 0.0
    return None if own is None or before is None else own + before


def means(cell: Cell, key: str) -> Estimate | None:
    """The mean over the steps that have the metric, if every run has some."""
    found = [run.each(key) for run in cell.runs]
    return estimate([sum(row) / len(row) for row in found]) if all(found) else None
