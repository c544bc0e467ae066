"""A comparison as tables for people: on a terminal, or as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from unigrpo_core.ablation.comparison import EXPERTS, Compared, Comparison
from unigrpo_core.ablation.statistics import Estimate, Interval

NOTHING = "-"
UNCLIPPED = "!"


@dataclass(frozen=True)
class Table:
    """``header`` and every row have one text per column."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(comparison: Comparison, plus_minus: str = "±") -> Iterator[Table]:
    """All tables of a comparison that have something to show, with that for the sign ±."""
    for table in _tables(comparison):
        rows = (tuple(text.replace("±", plus_minus) for text in row) for row in table.rows)
        yield replace(table, rows=tuple(rows))


def _tables(comparison: Comparison) -> Iterator[Table]:
    yield _values(comparison)
    if len(comparison.cells) > 1:
        yield _differences(comparison)
    if comparison.proxy:
        yield _proxy(comparison, comparison.proxy)
    if comparison.views:
        yield _views(comparison)
    yield _costs(comparison)


def as_text(comparison: Comparison, plus_minus: str = "±") -> str:
    """For a terminal: columns aligned, numbers to the right."""
    parts = [f"{table.title}\n{_aligned(table)}" for table in tables(comparison, plus_minus)]
    return "\n\n".join(parts) + _notes(comparison, "note: ", "\n\n")


def as_markdown(comparison: Comparison, plus_minus: str = "±") -> str:
    parts = []
    for table in tables(comparison, plus_minus):
        lines = [table.header, ("---", *("--:" for _ in table.header[1:])), *table.rows]
        body = "\n".join(f"| {' | '.join(_escaped(c) for c in line)} |" for line in lines)
        parts.append(f"**{_escaped(table.title)}**\n\n{body}")
    return "\n\n".join(parts) + _notes(comparison, "- ", "\n\n")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def _notes(comparison: Comparison, mark: str, above: str) -> str:
    lines = "\n".join(mark + note for note in comparison.notes)
    return above + lines if lines else ""


def _aligned(table: Table) -> str:
    rows = [table.header, *table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        ).rstrip()
        for row in rows
    )


# --- the tables -------------------------------------------------------------------------------


def _values(comparison: Comparison) -> Table:
    at, metric = comparison.at, comparison.metric
    between = at.kind in ("step", "seconds")
    several = any(len(item.cell.runs) > 1 for item in comparison.cells)
    intervals = ["bootstrap", "t 95 %"] if several else []
    header = ["cell", "seeds", "steps", "start", "final", *([] if between else intervals)]
    header += ["best", "of step", *([str(at), *intervals] if between else [])]
    header.append("gain" if at.kind == "final" else f"gain at {at}")
    rows = []
    for item in comparison.cells:
        figures = item.metrics.get(metric)
        row = [_label(item), str(len(item.cell.runs)), _steps(item)]
        if figures is None:
            rows.append((*row, *(NOTHING for _ in header[3:])))
            continue
        placed = figures.at if between else figures.final
        ends = (placed.bootstrap, placed.t) if placed else (None, None)
        spans = [span(interval) for interval in ends if several]
        row += [number(figures.start.mean), mean(figures.final), *([] if between else spans)]
        row += [mean(figures.best), str(figures.best_step)]
        row += [mean(figures.at), *spans] if between else []
        rows.append((*row, mean(figures.gain, "+")))
    first, last = comparison.cells[0].cell.runs[0].prompts
    prompts = f"{last}" if first == last else f"{first} and {last}"
    return Table(f"{metric} on {prompts} held-out prompts", tuple(header), tuple(rows))


def _differences(comparison: Comparison) -> Table:
    at = comparison.at
    rows = []
    for item in comparison.cells:
        if item.cell.label == comparison.against:
            continue
        figures = item.metrics.get(comparison.metric)
        found = figures.difference if figures else None
        if found is None:
            rows.append((_label(item), *[NOTHING] * 4))
            continue
        value = found.estimate
        seeds = " ".join(map(str, found.seeds))
        rows.append(
            (_label(item), seeds, mean(value, "+"), span(value.bootstrap, "+"), span(value.t, "+"))
        )
    return Table(
        f"{at.of(comparison.metric)}, minus that of {comparison.against}, by seed",
        ("cell", "seeds", "difference", "bootstrap", "t 95 %"),
        tuple(rows),
    )


def _proxy(comparison: Comparison, proxy: str) -> Table:
    rows = []
    for item in comparison.cells:
        row = [_label(item)]
        for name in (proxy, comparison.metric):
            figures = item.metrics.get(name)
            if figures is None:
                row += [NOTHING] * 2
            else:
                row += [f"{number(figures.start.mean)} > {mean(figures.at)}"]
                row += [mean(figures.gain, "+")]
        rows.append(tuple(row))
    return Table(
        f"proxy {proxy} against gold {comparison.metric}, start > {comparison.at}",
        ("cell", "proxy", "gain", "gold", "gain"),
        tuple(rows),
    )


def _views(comparison: Comparison) -> Table:
    names = [comparison.metric, *(f"{view}:{comparison.metric}" for view in comparison.views)]
    rows = []
    for item in comparison.cells:
        found = (item.metrics.get(name) for name in names)
        rows.append(
            (_label(item), *(mean(figures.final if figures else None) for figures in found))
        )
    return Table(
        f"final {comparison.metric} by view",
        ("cell", "evaluation", *comparison.views),
        tuple(rows),
    )


def _costs(comparison: Comparison) -> Table:
    header = (
        "cell",
        "train s",
        "calls/image",
        "network calls",
        "tokens",
        "signal text",
        "signal image",
    )
    rows = []
    for item in comparison.cells:
        cost, plus = item.cost, "+" if item.cost.staged else ""
        unit = " (GPU)" if cost.unit == "gpu" else ""
        rows.append(
            (
                _label(item),
                f"{cost.seconds.mean:.1f}{plus}{unit}" if cost.seconds else NOTHING,
                count(cost.calls_per_image),
                count(cost.network_calls, plus),
                count(cost.tokens, plus),
                *(
                    f"{item.signal[expert].mean:+z.2f}" if expert in item.signal else NOTHING
                    for expert in EXPERTS
                ),
            )
        )
    title = "cost per run, and signal (mean cosine between the gradients of half-batches)"
    if any(item.cost.staged for item in comparison.cells):
        title += "; +: with the stages before"
    return Table(title, header, tuple(rows))


# --- texts ------------------------------------------------------------------------------------


def _label(item: Compared) -> str:
    return f"{item.cell.label} {UNCLIPPED}" if item.unclipped else item.cell.label


def number(value: float, sign: str = "") -> str:
    return f"{value:{sign}z.3f}"


def mean(value: Estimate | None, sign: str = "") -> str:
    """A mean, and behind it the standard error if there is one."""
    if value is None:
        return NOTHING
    text = number(value.mean, sign)
    return text if value.se is None else f"{text} ± {value.se:.3f}"


def _steps(item: Compared) -> str:
    """How many a run made; of seeds whose budget went to different ones, fewest and most."""
    made = sorted({run.steps for run in item.cell.runs})
    return f"{made[0]}-{made[-1]}" if len(made) > 1 else str(made[0])


def span(interval: Interval | None, sign: str = "") -> str:
    return NOTHING if interval is None else f"[{', '.join(number(end, sign) for end in interval)}]"


def count(value: Estimate | None, mark: str = "") -> str:
    if value is None:
        return NOTHING
    whole = f"{value.mean:,.0f}" if value.mean >= 100 else f"{value.mean:.3g}"
    return whole + mark
