"""What a run shows while it goes: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table

from unigrpo_core.engine.cuts import is_cut, said_of_cuts
from unigrpo_core.engine.loop import Reporter
from unigrpo_core.engine.setup import Setup
from unigrpo_core.recipe import Resolved


@contextmanager
def choose_reporter() -> Iterator[Reporter]:
    """A live display on a terminal, plain lines elsewhere; ended properly whatever happens."""
    console = Console(highlight=False)
    if not console.is_terminal:
        yield Lines(Console(highlight=False, width=200, soft_wrap=True))
        return
    with progress_on(console) as progress:
        yield Live(progress)


def progress_on(console: Console) -> Progress:
    """The progress line: what is short and fixed first, then the figures, folded to what is left
    of the width."""
    rest = Column(ratio=1, overflow="fold")
    return Progress(
        BarColumn(16),
        TextColumn("step"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[figures]}", markup=False, table_column=rest),
        console=console,
        expand=True,
    )


class Lines(Reporter):
    """One line per step."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.steps = 0
        self.began = time.perf_counter()
        self.latest: dict[str, float] = {}

    def started(self, resolved: Resolved, folder: Path, setup: Setup) -> None:
        self.steps, self.began = resolved.recipe.steps, time.perf_counter()
        title = f": {resolved.recipe.title}" if resolved.recipe.title else ""
        self.console.print(f"{resolved.name}{title}", markup=False)
        trained = " and ".join(resolved.recipe.train) or "nothing"
        self.console.print(
            f"trains {trained} on {setup.device}, {resolved.recipe.compute.precision}; "
            f"writes {folder}",
            markup=False,
        )

    def stepped(self, step: int, metrics: Mapping[str, float], timing: Mapping[str, float]) -> None:
        figures = "  ".join(_figures(metrics, timing, self.latest))
        left = self.left(step)
        self.console.print(f"step {step}/{self.steps}  {figures}  {left}", markup=False)

    def left(self, step: int) -> str:
        """The time that the remaining steps will take, at the pace since the first evaluation."""
        seconds = (time.perf_counter() - self.began) / step * (self.steps - step)
        return f"left {seconds:.0f} s"

    def evaluated(self, step: int, means: Mapping[str, float]) -> None:
        if step == 0:
            self.began = time.perf_counter()
        self.latest = dict(means)
        shown = [f"{_short(name)} {means[name]:.3f}" for name in _shown(means)]
        figures = "  ".join((*shown, *said_of_cuts(means)))
        self.console.print(f"held-out prompts at step {step}:  {figures}", markup=False)

    def finished(self, folder: Path, summary: Mapping[str, Any]) -> None:
        self.console.print(_before_after(summary))
        self.console.print(
            f"{summary['steps']} steps, {summary['train_cpu_s']:.0f} CPU-seconds of training, "
            f"{summary['wall_s']:.0f} s in all",
            markup=False,
        )
        for name, what in _products(folder):
            self.console.print(f"{what:<22}{name}", markup=False)


class Live(Lines):
    """The same, with the steps as one progress line that is rewritten."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(progress.console)
        self.progress = progress
        self.task = progress.add_task("train", total=None, left="", figures="evaluating")

    def started(self, resolved: Resolved, folder: Path, setup: Setup) -> None:
        super().started(resolved, folder, setup)
        self.progress.update(self.task, total=self.steps)

    def stepped(self, step: int, metrics: Mapping[str, float], timing: Mapping[str, float]) -> None:
        figures = "  ".join(_figures(metrics, timing, self.latest))
        left = self.left(step)
        self.progress.update(self.task, completed=step, left=left, figures=figures)


def _figures(
    metrics: Mapping[str, float], timing: Mapping[str, float], latest: Mapping[str, float]
) -> Iterator[str]:
    """The figures of a step, those that the recipe has."""
    yield f"reward {metrics['reward']:.3f}"
    if latest:
        name, value = next(iter(latest.items()))
        yield f"held-out {_short(name)} {value:.3f}"
    gaps = {"text_mean": "gap text", "image_log_ratio": "image"}
    for key, word in gaps.items():
        if f"gap/{key}" in metrics:
            yield f"{word} {metrics[f'gap/{key}']:.0e}"
    for expert in ("text", "image"):
        if f"{expert}/clip_fraction" in metrics:
            yield f"{expert} clip {metrics[f'{expert}/clip_fraction']:.2f}"
    known = (
        *("loss", "clip_fraction", "ratio_deviation", "equal_groups"),
        *("grad_norm", "grad_cosine"),
    )
    for key, value in metrics.items():
        expert, _, name = key.partition("/")
        if expert in ("text", "image") and name not in known:
            yield f"{name} {value:.1e}"
    yield from said_of_cuts(metrics)
    if metrics.get("tokens") and timing.get("text_s"):
        yield f"{metrics['tokens'] / timing['text_s']:.0f} tokens/s"
    if metrics.get("images") and timing.get("image_s"):
        yield f"{metrics['images'] / timing['image_s']:.0f} images/s"


def _shown(means: Mapping[str, float]) -> list[str]:
    """The scores that are worth a line: of a further view only the rewards themselves."""
    return [name for name in means if not is_cut(name) and (":" not in name or "/" not in name)]


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _before_after(summary: Mapping[str, Any]) -> Table:
    table = Table(title=f"{summary['recipe']}, held-out prompts")
    table.add_column("mean of")
    for heading in ("before", "after", "gain"):
        table.add_column(heading, justify="right")
    for name in _shown(summary["gain"]):
        gain = summary["gain"][name]
        before, after = summary["before"][name], summary["after"][name]
        table.add_row(name, f"{before:.3f}", f"{after:.3f}", f"{gain:+.3f}")
    return table


def _products(folder: Path) -> Iterator[tuple[Path, str]]:
    """What the run has left, with a word for each."""
    sheets = folder / "sheets"
    pictures = [sheets / "before-after.png", *sorted(sheets.glob("step-*.png"))]
    left = [(path, "look at") for path in pictures if path.exists()][:1]
    left += [(folder / "metrics.jsonl", "every step"), (folder / "final", "weights")]
    yield from ((path, what) for path, what in left if path.exists())
    yield folder, "run folder"
