"""A comparison as data: JSON with all there is, CSV with one line per figure."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unigrpo_core.ablation.comparison import Compared, Comparison, Figures
from unigrpo_core.ablation.statistics import Estimate

COLUMNS = (
    *("cell", "figure", "metric", "step", "n", "mean", "se"),
    *("bootstrap_low", "bootstrap_high", "t_low", "t_high", "seeds", "values"),
)


def as_json(comparison: Comparison) -> str:
    """See docs/reference/compare.md for the keys."""
    at = comparison.at
    data = {
        "metric": comparison.metric,
        "proxy": comparison.proxy,
        "against": comparison.against,
        "at": {"kind": at.kind, "where": at.where if at.kind in ("step", "seconds") else None},
        "views": list(comparison.views),
        "cells": [_cell(item) for item in comparison.cells],
        "notes": list(comparison.notes),
    }
    return json.dumps(data, indent=2, allow_nan=False)


def as_csv(comparison: Comparison) -> str:
    """One line per cell, figure and metric; ``seeds`` and ``values`` are separated by spaces."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for item in comparison.cells:
        writer.writerows(_lines(item))
    return text.getvalue().removesuffix("\n")


# --- JSON -------------------------------------------------------------------------------------


def _cell(item: Compared) -> dict[str, Any]:
    cost = item.cost
    return {
        "cell": item.cell.label,
        "seeds": list(item.cell.seeds),
        "steps": item.cell.runs[0].steps,
        "metrics": {name: _figures(figures) for name, figures in item.metrics.items()},
        "cost": {
            "unit": cost.unit,
            "seconds": _estimate(cost.seconds),
            "network_calls": _estimate(cost.network_calls),
            "calls_per_image": _estimate(cost.calls_per_image),
            "tokens": _estimate(cost.tokens),
            "staged": cost.staged,
        },
        "signal": {expert: _estimate(value) for expert, value in item.signal.items()},
        "clip": dict(item.clip),
        "unclipped": list(item.unclipped),
        "values": item.cell.runs[0].values,
        "runs": [
            {
                "seed": run.seed,
                "folder": str(run.folder),
                "recipe": run.name,
                "seconds": run.clock and run.clock[-1],
                "earlier": dict(run.earlier) or None,
                "evaluations": [dict(row) for row in run.evaluations],
            }
            for run in item.cell.runs
        ],
    }


def _figures(figures: Figures) -> dict[str, Any]:
    found = figures.difference
    return {
        "start": _estimate(figures.start),
        "final": _estimate(figures.final),
        "best": {"step": figures.best_step, **(_estimate(figures.best) or {})},
        "at": _estimate(figures.at),
        "gain": _estimate(figures.gain),
        "difference": found and {"seeds": list(found.seeds), **(_estimate(found.estimate) or {})},
    }


def _estimate(value: Estimate | None) -> dict[str, Any] | None:
    if value is None:
        return None
    return {
        "n": value.n,
        "mean": value.mean,
        "se": value.se,
        "bootstrap": value.bootstrap and list(value.bootstrap),
        "t": value.t and list(value.t),
        "values": list(value.values),
    }


# --- CSV --------------------------------------------------------------------------------------


def _lines(item: Compared) -> Iterator[Sequence[object]]:
    label, seeds, last = item.cell.label, item.cell.seeds, item.cell.runs[0].steps
    for name, found in item.metrics.items():
        yield _line(label, "start", name, 0, found.start, seeds)
        yield _line(label, "final", name, last, found.final, seeds)
        yield _line(label, "best", name, found.best_step, found.best, seeds)
        for figure, value in (("at", found.at), ("gain", found.gain)):
            if value is not None:
                yield _line(label, figure, name, "", value, seeds)
        if found.difference is not None:
            paired = found.difference
            yield _line(label, "difference", name, "", paired.estimate, paired.seeds)
    cost = item.cost
    others: Mapping[str, Estimate | None] = {
        f"{cost.unit}_seconds": cost.seconds,
        "network_calls": cost.network_calls,
        "calls_per_image": cost.calls_per_image,
        "tokens": cost.tokens,
        **{f"signal_{expert}": value for expert, value in item.signal.items()},
    }
    for figure, value in others.items():
        if value is not None:
            yield _line(label, figure, "", "", value, seeds)
    for expert, most in item.clip.items():
        yield (label, f"largest_clip_{expert}", "", "", len(seeds), most, *[""] * 7)


def _line(
    label: str, figure: str, metric: str, step: object, value: Estimate, seeds: Sequence[int]
) -> Sequence[object]:
    ends = (*(value.bootstrap or ("", "")), *(value.t or ("", "")))
    return (
        *(label, figure, metric, step, value.n, value.mean),
        "" if value.se is None else value.se,
        *ends,
        " ".join(map(str, seeds)),
        " ".join(map(repr, value.values)),
    )
