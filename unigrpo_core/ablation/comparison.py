"""Cells compared: every figure of every cell, with its uncertainty over the seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from unigrpo_core.ablation.alike import check_metrics
from unigrpo_core.ablation.cells import Cell
from unigrpo_core.ablation.choice import At, choose_against, choose_metric, choose_proxy
from unigrpo_core.ablation.measures import Cost, best_of, cost_of, means, values_at
from unigrpo_core.ablation.statistics import Estimate, estimate

EXPERTS = ("text", "image")
OVER_SEEDS = (
    "intervals are over the seeds alone: all runs have the same held-out prompts and draws; and "
    "several differences are read at once: that one of their intervals misses is likelier than 5 %"
)


@dataclass(frozen=True)
class Difference:
    """A cell minus the one it is compared with, over the seeds that both have."""

    seeds: tuple[int, ...]
    estimate: Estimate


@dataclass(frozen=True)
class Figures:
    """One metric of one cell. ``best`` is at ``best_step``, the evaluated step with the highest
    mean over the seeds; ``at`` is the value that was asked for, ``gain`` its distance from the
    start; these and ``difference`` are None where there is no such value."""

    start: Estimate
    final: Estimate
    best: Estimate
    best_step: int
    at: Estimate | None
    gain: Estimate | None
    difference: Difference | None


@dataclass(frozen=True)
class Compared:
    """All of one cell. ``signal``: by expert, the mean cosine between the gradients of two halves
    of an update's prompts. ``clip``: by trained expert, the largest clip fraction of any step and
    seed. Experts without such a figure are absent."""

    cell: Cell
    metrics: Mapping[str, Figures]
    cost: Cost
    signal: Mapping[str, Estimate]
    clip: Mapping[str, float]

    @property
    def unclipped(self) -> tuple[str, ...]:
        """The trained experts whose clip never acted."""
        return tuple(expert for expert, most in self.clip.items() if most == 0)


@dataclass(frozen=True)
class Comparison:
    """What ``unigrpo compare`` shows. ``proxy`` is None where no other reward was trained on."""

    metric: str
    proxy: str | None
    against: str
    at: At
    cells: tuple[Compared, ...]
    notes: tuple[str, ...]

    @property
    def views(self) -> tuple[str, ...]:
        """The views in which the metric was evaluated."""
        tail = f":{self.metric}"
        names = dict.fromkeys(name for compared in self.cells for name in compared.metrics)
        return tuple(name.removesuffix(tail) for name in names if name.endswith(tail))


def compare(
    cells: Sequence[Cell],
    metric: str | None = None,
    against: str | None = None,
    at: At = At("final"),  # noqa: B008 (frozen)
    proxy: str | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """Compares at least one cell. What is None is chosen: see :mod:`unigrpo_core.ablation.choice`.
    ``notes`` come before those of the comparison.

    Raises:
        UsageError: no run has the metric or proxy, or no cell the name.
        UserError: the runs cannot be compared, as :func:`check_metrics` says.
    """
    runs = [run for cell in cells for run in cell.runs]
    gold = choose_metric(cells, metric)
    shown_proxy, found = choose_proxy(cells, gold, proxy)
    other = choose_against(cells, against)
    metrics = [name for name in (gold, shown_proxy) if name]
    found += check_metrics(runs, metrics)
    at = at.resolved(cells)
    compared = tuple(_compared(cell, other, at) for cell in cells)
    for item in compared:
        found += _notes(item, other, at, metrics)
    found += _clip_notes(compared)
    if len({run.on_gpu for run in runs}) > 1:
        found.append("some runs were on a CPU, others on a GPU: their seconds cannot be compared")
    if any(len(cell.runs) > 1 for cell in cells):
        found.append(OVER_SEEDS)
    return Comparison(gold, shown_proxy, other.label, at, compared, (*notes, *found))


def _compared(cell: Cell, other: Cell, at: At) -> Compared:
    names = [n for n in cell.runs[0].metric_names if all(n in r.metric_names for r in cell.runs)]
    signal = {expert: means(cell, f"{expert}/grad_cosine") for expert in EXPERTS}
    clip = {
        expert: [f for run in cell.runs for f in run.each(f"{expert}/clip_fraction")]
        for expert in cell.runs[0].values.get("train", ())
    }
    return Compared(
        cell,
        {name: _figures(cell, other, at, name) for name in names},
        cost_of(cell),
        {expert: found for expert, found in signal.items() if found is not None},
        {expert: max(fractions) for expert, fractions in clip.items() if fractions},
    )


# --- values -----------------------------------------------------------------------------------


def _figures(cell: Cell, other: Cell, at: At, metric: str) -> Figures:
    curves = [curve for run in cell.runs if (curve := run.curve(metric))]
    start = {run.seed: curve.values[0] for run, curve in zip(cell.runs, curves, strict=True)}
    final = [curve.values[-1] for curve in curves]
    best = best_of(cell, metric)
    found = values_at(cell, metric, at)
    theirs = values_at(other, metric, at)
    difference = None
    if cell is not other and found and theirs and (common := sorted(found.keys() & theirs)):
        pairs = [found[seed] - theirs[seed] for seed in common]
        difference = Difference(tuple(common), estimate(pairs))
    return Figures(
        estimate(tuple(start.values())),
        estimate(final),
        estimate([curve.values[best] for curve in curves]),
        curves[0].steps[best],
        estimate(tuple(found.values())) if found else None,
        estimate([value - start[seed] for seed, value in found.items()]) if found else None,
        difference,
    )


# --- notes ------------------------------------------------------------------------------------


def _notes(item: Compared, other: Cell, at: At, metrics: Sequence[str]) -> list[str]:
    """What the figures of a cell do not say themselves."""
    cell, notes = item.cell, []
    for name in metrics:
        if name not in item.metrics:
            notes.append(f"{cell.label}: {name} was not evaluated in every run")
        elif item.metrics[name].at is None:
            notes.append(f"{cell.label}: no {name} at {at}: {_why(cell, name, at)}")
    common = set(cell.seeds) & set(other.seeds)
    if cell.seeds != other.seeds:
        which = f"{', '.join(map(str, sorted(common)))} only" if common else "none"
        notes.append(
            f"{cell.label} and {other.label} are paired by the seeds that both have: {which}"
        )
    gone = ["train s"] if any(run.clock is None for run in cell.runs) else []
    for key in ("network_calls", "tokens"):
        if any(run.before(key) is None for run in cell.runs):
            gone.append(key.replace("_", " "))
    if gone:
        notes.append(
            f"{cell.label}: what the stages before took is not on record ({', '.join(gone)}): the "
            "files of its runs cover the last stage only"
        )
    return notes


def _clip_notes(compared: Sequence[Compared]) -> Iterator[str]:
    for expert in EXPERTS:
        labels = [item.cell.label for item in compared if expert in item.unclipped]
        if labels:
            yield f"! the {expert} clip never acted, in no step of any seed: {', '.join(labels)}"


def _why(cell: Cell, metric: str, at: At) -> str:
    run = cell.runs[0]
    curve = run.curve(metric)
    if curve is not None and len(curve.steps) < len(run.evaluations):
        return "it is evaluated at the start and the end only"
    if at.kind == "step":
        return f"it ends at step {cell.runs[0].steps}"
    clocks = {run.seed: run.clock for run in cell.runs if run.clock}
    if len(clocks) < len(cell.runs):
        return "the seconds of the stages before are not on record"
    late = max(clock[0] for clock in clocks.values())
    if late > at.where:
        return f"the stages before took {late:.1f} s"
    end, seed = min((clock[-1], seed) for seed, clock in clocks.items())
    return f"seed {seed} ends at {end:.1f} s"
