"""The tables of docs/reference/methods.md, in Markdown.

    python benchmarks/methods.py                  the recipes of recipes/neighbours, by property
    python benchmarks/methods.py runs/neighbours  the leaderboard of their finished runs
    python benchmarks/methods.py runs/tuning-image --by image.lr
                                                  the gain of finished runs, by a key's values

The first reads recipes and builds the light objects of methods: nothing is run, and no torch is
loaded. Links are those of the page.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite, prod
from pathlib import Path
from typing import Any

from unigrpo_core.ablation.cells import Cell, to_cells
from unigrpo_core.ablation.choice import At
from unigrpo_core.ablation.measures import cost_of, values_at
from unigrpo_core.ablation.reading import read_runs
from unigrpo_core.ablation.statistics import Estimate, estimate
from unigrpo_core.catalog import load_catalog
from unigrpo_core.cli import memory
from unigrpo_core.errors import UserError
from unigrpo_core.interfaces import ImageObjective
from unigrpo_core.recipe import Resolved, load_recipe, slots, toml_value
from unigrpo_core.workload import PROMPT_TOKENS

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "recipes" / "_base" / "neighbours.toml"
NEIGHBOURS = sorted((ROOT / "recipes" / "neighbours").glob("*.toml"))
FROM_PAGE = "../../recipes/neighbours"
METRIC, QUALITY = "board_verifier", "board_verifier/quality"
NOTHING = "-"
ASIDE = ("extends", "title", "lr")  # what makes no method; learning rates have their own table
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")

Row = Sequence[str]


# --- by property ------------------------------------------------------------------------------


def properties() -> Iterator[str]:
    """The tables of the recipes: what makes each, and what it takes."""
    catalog = load_catalog()
    base = load_recipe(BASE, catalog)
    recipes = {file: load_recipe(file, catalog) for file in NEIGHBOURS}
    rows = [makes(file, one, base) for file, one in recipes.items()]
    yield markdown(("recipe", "title", "what makes it", "paper"), rows)
    columns = ("sampling", "old", "anchors", "update", "all")
    header = ("recipe", *columns, "reads", "off-policy by", "clip of text", "clip of images")
    yield markdown(header, (takes(one) for one in recipes.values()), range(1, 6))


def makes(file: Path, one: Resolved, base: Resolved) -> Row:
    """What a recipe states that the base does not have, and the papers of that."""
    stated = dict(keys(tomllib.loads(file.read_text(encoding="utf-8"))))
    plain = dict(keys(base.values))
    said = [
        f"{path.removesuffix('.0')} {words(value, plain.get(path))}"
        for path, value in stated.items()
        if value != plain.get(path)
    ]
    cites = [
        slot.component.provider.cite
        for path, slot in slots(one.recipe)
        if path in stated and bare(stated[path]) != bare(plain.get(path))
    ]
    papers = [
        f"[{paper}](https://arxiv.org/abs/{paper})"
        for paper in dict.fromkeys(ARXIV.findall(" ".join(cites)))
    ]
    return link(one.name), one.recipe.title, "; ".join(said), ", ".join(papers) or NOTHING


def keys(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a recipe by dotted path; a component counts as one."""
    for key, value in table.items():
        if key in ASIDE:
            continue
        if isinstance(value, dict) and "use" not in value:
            yield from keys(value, f"{above}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield from ((f"{above}{key}.{place}", item) for place, item in enumerate(value))
        else:
            yield f"{above}{key}", value


def words(value: Any, base: Any) -> str:
    """A value; of a component its name, and the keys that are not as the base's."""
    if not isinstance(value, dict):
        return toml_value(value)
    base = base if isinstance(base, dict) else {}
    options = [
        f"{key} {toml_value(item)}"
        for key, item in value.items()
        if key != "use" and base.get(key) != item
    ]
    name = bare(value)
    return f"{name} ({', '.join(options)})" if name and options else name or ", ".join(options)


def bare(slot: Any) -> str:
    """The name of a component without its distribution; empty if there is none."""
    return str(slot.get("use", "")).rpartition(":")[2] if isinstance(slot, dict) else ""


def takes(one: Resolved) -> Row:
    """What a step of a recipe takes, and what it reads."""
    recipe = one.recipe
    account = memory.take(one, PROMPT_TOKENS)
    if isinstance(account, str):
        raise UserError(f"{one.name}: {account}")
    each = account.calls
    means = [
        sum(getattr(calls, name) for calls in each for name in names) / len(each)
        for names in (("sampling",), ("old",), ("reference", "average"), ("update",))
    ]
    mark = "" if recipe.group.equal == "keep" else "*"
    assert recipe.image.objective is not None
    assert recipe.text.objective is not None
    image: ImageObjective = recipe.image.objective.build()
    ratio = isfinite(image.clip_range(prod(recipe.image.size)))
    anchors = {
        slot.anchor
        for slot in (*recipe.text.regularizers, *recipe.image.regularizers)
        if slot.weight and slot.compares_with == slot.anchor
    }
    reads = {
        "old": ratio or "old" in image.needs,
        "reference": "reference" in image.needs | anchors,
        "moving average": recipe.ema.sample or "ema" in image.needs | anchors,
        "unconditional": bool(recipe.image.guidance and recipe.image.guidance.build().branches),
        "gradient of the reward": "score" in image.needs,
    }
    off = f"{recipe.updates.count - 1} update"
    return (
        link(one.name),
        *(f"{mean:,.0f}{mark}" for mean in (*means, sum(means))),
        ", ".join(name for name, read in reads.items() if read) or NOTHING,
        "the average" if recipe.ema.sample else off if recipe.updates.count > 1 else NOTHING,
        recipe.text.objective.build().clips or NOTHING,
        image.clips or NOTHING,
    )


# --- leaderboard ------------------------------------------------------------------------------


def leaderboard(folder: Path) -> Iterator[str]:
    """The finished runs below a folder, the highest gain first."""
    runs, notes = read_runs([folder], skip_unfinished=True)
    cells, merged = to_cells(runs)
    header = (
        *("method", "seeds", "gain", "t 95 %", "quality", "gap of text", "gap of images"),
        *("network calls", "CPU s", "steps"),
    )
    ranked = sorted(cells, key=lambda cell: -gain(cell).mean)
    yield markdown(header, map(standing, ranked), range(1, len(header)))
    for note in (*notes, *merged):
        yield f"- {note}"


def by_values(folder: Path, key: str) -> Iterator[str]:
    """The gains of the finished runs below a folder, a row per recipe and a column per value of a
    key; the highest of a row is bold.

    Raises:
        UserError: a run does not have the key.
    """
    cells, _ = to_cells(read_runs([folder], skip_unfinished=True)[0])
    found: dict[str, dict[Any, Estimate]] = {}
    for cell in cells:
        value: Any = cell.runs[0].values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            raise UserError(f"{cell.label} has no {key}: see its run.json for the keys it has")
        row = found.setdefault(cell.runs[0].name, {})
        if value in row:
            raise UserError(f"{cell.label}: runs of {cell.runs[0].name} differ in more than {key}")
        row[value] = gain(cell)
    values = sorted({value for row in found.values() for value in row})

    def shown(name: str, gains: Mapping[Any, Estimate]) -> Row:
        most = max(one.mean for one in gains.values())
        texts = {value: number(one, "+.3f") for value, one in gains.items()}
        best = {value: f"**{texts[value]}**" for value in gains if gains[value].mean == most}
        return link(name), *((texts | best).get(value, NOTHING) for value in values)

    header = (f"gain by {key}", *(f"{value:g}" for value in values))
    yield markdown(header, (shown(*item) for item in sorted(found.items())), range(1, len(header)))


def gain(cell: Cell) -> Estimate:
    """What training added to the verifier.

    Raises:
        UserError: a run was not evaluated by it.
    """
    ends = values_at(cell, METRIC, At.parse("final"))
    if ends is None:
        raise UserError(f"{cell.label}: {METRIC} was not evaluated in all of its runs")
    return estimate([ends[run.seed] - run.evaluations[0][METRIC] for run in cell.runs])


def standing(cell: Cell) -> Row:
    """A cell's row: means over seeds, gaps the largest of any step."""
    gained, cost = gain(cell), cost_of(cell)
    quality = values_at(cell, QUALITY, At.parse("final"))
    interval = NOTHING if gained.t is None else f"[{gained.t[0]:+.3f}, {gained.t[1]:+.3f}]"
    return (
        link(cell.label),
        str(gained.n),
        number(gained, "+.3f"),
        interval,
        number(estimate([*quality.values()]) if quality else None, ".3f"),
        largest(cell, "gap/text_max"),
        largest(cell, "gap/image_log_ratio"),
        number(cost.network_calls, ",.0f"),
        number(cost.seconds, ".0f"),
        number(estimate([float(run.steps) for run in cell.runs]), ".0f"),
    )


def largest(cell: Cell, key: str) -> str:
    """The highest value of a step's metric in any run."""
    found = [value for run in cell.runs for value in run.each(key)]
    return f"{max(found):.1e}" if found else NOTHING


def number(of: Estimate | None, spec: str) -> str:
    """A mean with its standard error."""
    if of is None:
        return NOTHING
    error = "" if of.se is None else f" ± {of.se:{spec.lstrip('+')}}"
    return f"{of.mean:{spec}}{error}"


# --- Markdown ---------------------------------------------------------------------------------


def link(name: str) -> str:
    """A recipe's name with its file."""
    known = {file.stem for file in NEIGHBOURS}
    return f"[{name}]({FROM_PAGE}/{name}.toml)" if name in known else name


def markdown(header: Row, rows: Iterable[Row], numbers: Sequence[int] = ()) -> str:
    """A table, whose columns of numbers end in one line."""
    ruler = ["--:" if place in numbers else "---" for place in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ruler, *rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="?", type=Path, help="folder of finished runs")
    parser.add_argument("--by", metavar="KEY", help="a key that the runs differ in")
    arguments = parser.parse_args()
    runs: Path | None = arguments.runs
    if arguments.by and runs is None:
        parser.error("--by needs a folder of finished runs")
    try:
        if runs is None:
            parts = list(properties())
        else:
            parts = list(by_values(runs, arguments.by) if arguments.by else leaderboard(runs))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n\n".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
