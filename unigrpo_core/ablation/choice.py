"""What is compared: the metric, the proxy, the reference cell, and where in a run; as asked for, or
chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

from unigrpo_core.ablation.cells import Cell
from unigrpo_core.ablation.runs import Run
from unigrpo_core.errors import UsageError, did_you_mean

REFERENCE = "joint"


@dataclass(frozen=True)
class At:
    """Where in a run values are taken; ``where`` is the training step or the second (of training,
    the stages before included: of the CPU, or on a GPU of the wall), infinite for the largest that
    all cells reach. ``cpu`` is ``seconds`` that must be a CPU's."""

    kind: Literal["final", "best", "step", "seconds", "cpu"]
    where: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """``final``, ``best``, ``step:N``, ``seconds:N``, ``seconds:min``, ``cpu:N`` or
        ``cpu:min``."""
        kind, _, where = text.partition(":")
        try:
            if text in ("final", "best"):
                return cls("final" if text == "final" else "best")
            if kind == "step" and where.isdecimal():
                return cls("step", int(where))
            if kind in ("seconds", "cpu"):
                number = float("inf") if where == "min" else float(where)
                if number >= 0 and (where == "min" or number < float("inf")):
                    return cls("seconds" if kind == "seconds" else "cpu", number)
        except ValueError:
            pass
        raise UsageError(
            f"--at {text}: expected final, best, step:N, seconds:N, seconds:min, cpu:N or cpu:min"
        )

    def resolved(self, cells: Sequence[Cell]) -> Self:
        """With ``seconds`` for ``cpu``, and the largest budget that all trained runs reach whose
        seconds are known, if that was asked for.

        Raises:
            UsageError: seconds are asked for and some runs were on a CPU, others on a GPU; or those
                of a CPU, and the runs were on a GPU.
        """
        if self.kind not in ("seconds", "cpu"):
            return self
        runs = [run for cell in cells for run in cell.runs if run.steps]
        on_gpu = {run.on_gpu for run in runs}
        if len(on_gpu) > 1:
            raise UsageError(
                f"--at {self.kind}: some runs were on a CPU, others on a GPU; take --at step:N"
            )
        if self.kind == "cpu" and on_gpu == {True}:
            raise UsageError(
                "--at cpu: these runs were on a GPU, where the seconds that count are those of the "
                "wall; take --at seconds:N or seconds:min"
            )
        where = self.where
        if where == float("inf"):
            where = min((run.clock[-1] for run in runs if run.clock), default=0.0)
        return replace(self, kind="seconds", where=where)

    def of(self, metric: str) -> str:
        """The metric there, in words."""
        return f"{self} {metric}" if self.kind in ("final", "best") else f"{metric} at {self}"

    def __str__(self) -> str:
        if self.kind in ("final", "best"):
            return self.kind
        return f"step {self.where:g}" if self.kind == "step" else f"{self.where:.1f} s"


def choose_metric(cells: Sequence[Cell], asked: str | None) -> str:
    """The metric asked for; else the monitor of most cells, else the reward of most, the first of
    equals; of those that all runs have, or if there is none such, that some have."""
    if asked is not None:
        return _known(cells, "--metric", asked)
    runs = _runs(cells)
    monitors = Counter(name for cell in cells for name in cell.runs[0].monitored)
    scores = Counter(name for cell in cells for name in cell.runs[0].scores)
    listed = [name for counts in (monitors, scores) for name, _ in counts.most_common()]
    names = list(dict.fromkeys([*listed, *_metrics(cells)]))
    everywhere = [name for name in names if all(name in run.metric_names for run in runs)]
    somewhere = [name for name in names if any(name in run.metric_names for run in runs)]
    return (everywhere + somewhere)[0]


def choose_proxy(
    cells: Sequence[Cell], gold: str, asked: str | None
) -> tuple[str | None, list[str]]:
    """The proxy asked for; else the reward other than the gold that most cells were trained on, by
    a weight that is not 0. With a note on others that were trained on."""
    if asked is not None:
        return _known(cells, "--proxy", asked), []
    trained = Counter(name for cell in cells for name in cell.runs[0].trained_on if name != gold)
    evaluated = set(_metrics(cells))
    names = [name for name, _ in trained.most_common() if name in evaluated]
    if not names:
        return None, []
    chosen, *others = names
    note = f"the proxy is {chosen}; also trained on: {', '.join(others)} (--proxy NAME)"
    return chosen, [note] if others else []


def choose_against(cells: Sequence[Cell], asked: str | None) -> Cell:
    """The cell asked for; else the one called joint, else the first."""
    labels = {cell.label: cell for cell in cells}
    if asked is None:
        return labels.get(REFERENCE, cells[0])
    if asked not in labels:
        raise UsageError(f"--against {asked}: no such cell{did_you_mean(asked, list(labels))}")
    return labels[asked]


def _known(cells: Sequence[Cell], option: str, name: str) -> str:
    names = _metrics(cells)
    if name not in names:
        raise UsageError(f"{option} {name}: no run has this metric{did_you_mean(name, names)}")
    return name


def _metrics(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(name for run in _runs(cells) for name in run.metric_names))


def _runs(cells: Sequence[Cell]) -> list[Run]:
    return [run for cell in cells for run in cell.runs]
