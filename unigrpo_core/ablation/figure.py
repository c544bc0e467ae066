"""A comparison as a figure: curves over training, and where the cells end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigrpo_core.ablation.choice import At
from unigrpo_core.ablation.comparison import Compared, Comparison
from unigrpo_core.ablation.runs import Curve
from unigrpo_core.errors import UsageError, UserError, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png")
# Paul Tol's "bright" and "muted" colours, told apart with any colour vision; their order keeps
# neighbours apart. Beyond them, and beside them, cells differ in mark and line.
COLOURS = (
    *("#332288", "#DDAA33", "#117733", "#CC6677", "#88CCEE"),
    *("#882255", "#44AA99", "#000000", "#999933", "#AA4499"),
)
MARKS = "osD^vP<>X"  # one fewer than colours: 90 cells look different
LINES = ("-", "--", "-.", ":")
LOOK: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "unigrpo",  # names in the file are the same every time
}


def check_figures(files: Sequence[Path]) -> None:
    """Whether the figures can be drawn, before anything is read.

    Raises:
        UsageError: a file's suffix is not of a known format, or its folder is not there.
        UserError: matplotlib is missing.
    """
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            raise UsageError(f"--figure {file}: expected a name that ends in .svg or .png")
        if not file.absolute().parent.is_dir():
            raise UsageError(f"--figure {file}: {shown(file.absolute().parent)} is no folder")
    if files and find_spec("matplotlib") is None:
        raise UserError("--figure needs matplotlib: pip install 'unigrpo[figures]'")


def write_figure(comparison: Comparison, file: Path) -> None:
    """Draws the comparison; the same comparison gives the same bytes.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = len(comparison.cells)
    longest = max(len(item.cell.label) for item in comparison.cells)
    with rc_context(LOOK):
        size = (9 + 0.075 * longest, max(4.0, 1.2 + 0.26 * rows))  # inches
        figure = Figure(figsize=size, layout="constrained")
        left, right = figure.subplots(1, 2)
        _curves(left, comparison)
        if comparison.proxy is not None:
            _frontier(right, comparison, comparison.proxy)
            handles, labels = left.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside right upper", frameon=False)
        else:
            _finals(right, comparison)
        suffix = file.suffix.lower()
        partial = file.with_name(f".part-{file.name}")
        try:
            figure.savefig(
                partial,
                format=suffix[1:],
                dpi=150,
                metadata={"Date": None} if suffix == ".svg" else {"Software": None},
            )
            os.replace(partial, file)
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror or error}") from error
        finally:
            partial.unlink(missing_ok=True)


def style(place: int) -> dict[str, Any]:
    """How the cell at a place looks in every panel."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKS[place % len(MARKS)],
        "markersize": 5,
    }


# --- left: curves -----------------------------------------------------------------------------


def _curves(axes: Axes, comparison: Comparison) -> None:
    """The mean over the seeds at every evaluation, in a band from the lowest to the highest."""
    over_seconds = comparison.at.kind == "seconds"
    banded = False
    for place, item in enumerate(comparison.cells):
        curves = _shared(item, comparison.metric)
        if not curves:
            continue
        clocks = [curve.seconds for curve in curves if curve.seconds]
        if over_seconds and len(clocks) < len(curves):
            continue
        across = clocks if over_seconds else [curve.steps for curve in curves]
        x = [sum(column) / len(column) for column in zip(*across, strict=True)]
        columns = list(zip(*(curve.values for curve in curves), strict=True))
        y = [sum(column) / len(column) for column in columns]
        looks = style(place)
        line = LINES[place // len(COLOURS) % len(LINES)]
        axes.plot(x, y, line, label=item.cell.label, linewidth=1.6, zorder=3, **looks)
        if len(curves) > 1:
            banded = True
            low, high = map(min, columns), map(max, columns)
            axes.fill_between(x, [*low], [*high], color=looks["color"], alpha=0.13, linewidth=0)
    seconds = "seconds of training, stages before included"
    axes.set_xlabel(seconds if over_seconds else "training steps")
    axes.locator_params(axis="x", nbins=7, integer=not over_seconds)
    axes.set_ylabel(comparison.metric)
    band = "; band: lowest to highest seed" if banded else ""
    axes.set_title(f"mean over seeds{band}", loc="left")


def _shared(item: Compared, metric: str) -> list[Curve]:
    """The curves of a cell's seeds, which are evaluated at the same steps."""
    return [curve for run in item.cell.runs if (curve := run.curve(metric)) is not None]


# --- right: where they are ---------------------------------------------------------------------


def _frontier(axes: Axes, comparison: Comparison, proxy: str) -> None:
    """Gold against proxy where asked for, with standard errors; every start as a cross."""
    starts = set()
    for place, item in enumerate(comparison.cells):
        gold, other = item.metrics.get(comparison.metric), item.metrics.get(proxy)
        if gold is None or other is None:
            continue
        starts.add((round(other.start.mean, 4), round(gold.start.mean, 4)))
        if gold.at is None or other.at is None:
            continue
        axes.errorbar(
            other.at.mean,
            gold.at.mean,
            xerr=other.at.se,
            yerr=gold.at.se,
            elinewidth=1.2,
            capsize=2,
            linestyle="none",
            **{**style(place), "markersize": 7},
        )
    for x, y in sorted(starts):
        axes.plot(x, y, "x", color="#555555", markersize=9, markeredgewidth=2, zorder=4)
        axes.annotate("start", (x, y), (7, -4), textcoords="offset points", color="#555555")
    axes.locator_params(axis="x", nbins=7)
    axes.set_xlabel(f"proxy: {proxy}")
    axes.set_ylabel(f"gold: {comparison.metric}")
    axes.set_title(f"{_where(comparison.at)}; bars: standard error", loc="left")


def _finals(axes: Axes, comparison: Comparison) -> None:
    """Values where asked for with bootstrap intervals, one row per cell, named at its left."""
    for place, item in enumerate(comparison.cells):
        figures = item.metrics.get(comparison.metric)
        if figures is None or figures.at is None:
            continue
        mean = figures.at.mean
        low, high = figures.at.bootstrap or (mean, mean)
        axes.errorbar(
            mean,
            place,
            xerr=[[max(0.0, mean - low)], [max(0.0, high - mean)]],
            elinewidth=1.6,
            capsize=3,
            linestyle="none",
            **{**style(place), "markersize": 7},
        )
    axes.set_yticks(range(len(comparison.cells)), [item.cell.label for item in comparison.cells])
    axes.set_ylim(len(comparison.cells) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=7)
    axes.set_xlabel(comparison.at.of(comparison.metric))
    axes.set_title(f"{_where(comparison.at)}; bars: bootstrap over seeds", loc="left")


def _where(at: At) -> str:
    return str(at) if at.kind in ("final", "best") else f"at {at}"
