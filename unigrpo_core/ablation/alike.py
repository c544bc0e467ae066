"""Which runs can be compared: those of one model that were evaluated alike, and whose metrics mean
the same."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from unigrpo_core.ablation.cells import said
from unigrpo_core.ablation.runs import Run
from unigrpo_core.errors import UserError, shown
from unigrpo_core.loading import PLUGIN_FILE
from unigrpo_core.recipe import toml_value
from unigrpo_core.recipe.emit import leaves

WORLD = re.compile(
    r"policy\..*|source\..*|evaluation\.(?!sheet$|every$).*|image\.size|text\.max_tokens"
    r"|text\.temperature|compute\.precision"
)
SAME_START = 0.01  # by how much of their size first evaluations of one model may differ


def check_world(runs: Sequence[Run]) -> None:
    """Whether all runs were made with the same model and evaluated alike.

    Raises:
        UserError: two were not; it names both folders.
    """
    _check_equal([(run, _world(run)) for run in runs])


def check_metrics(runs: Sequence[Run], metrics: Sequence[str]) -> list[str]:
    """Notes on what the runs differ in beside the ``metrics``, which are what is shown.

    Raises:
        UserError: two runs have another reward or monitor behind one of the metrics, or begin with
            another value of it; it names both folders.
    """
    for metric in metrics:
        found = [(run, options) for run in runs if (options := _options(run, metric)) is not None]
        _check_equal(found, f" of {metric}")
    return [*_check_starts(runs, metrics), *_versions(runs)]


def _check_equal(tables: Sequence[tuple[Run, Mapping[str, Any]]], of: str = "") -> None:
    for run, other in tables[1:]:
        first_run, first = tables[0]
        for key in dict.fromkeys((*first, *other)):
            if first.get(key) != other.get(key):
                raise UserError(
                    _apart(f"{key}{of}", (first_run, first.get(key)), (run, other.get(key)))
                )


def _apart(key: str, *pair: tuple[Run, Any]) -> str:
    one, two = (
        f"{'absent' if value is None else toml_value(value)} in {shown(run.folder)}"
        for run, value in pair
    )
    return f"these runs cannot be compared: {key} is {one}, but {two}"


def _world(run: Run) -> dict[str, Any]:
    """What must be equal for runs to be compared, by dotted path."""
    return {**world(said(run)), "prompts evaluated": list(run.prompts)}


def world(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a recipe's values by dotted path those that must be equal for runs to be compared."""
    found = {key: value for key, value in values.items() if WORLD.fullmatch(key)}
    found.setdefault("evaluation.episode", values.get("episode"))
    return found


# --- metrics ----------------------------------------------------------------------------------


def _options(run: Run, metric: str) -> dict[str, Any] | None:
    """What makes a metric of a run what it is, by dotted path; None if the run does not have it."""
    slot = _behind(run, metric)
    if slot is None or metric not in run.metric_names:
        return None
    own = {key: value for key, value in slot.items() if key not in ("use", "weight")}
    made = {".".join(map(str, path)): value for path, value in leaves(own)}
    if _from_plugin_file(run, str(slot["use"])):
        made[f"the plugin file {PLUGIN_FILE}"] = run.plugin_file[:16]
    return made


def _behind(run: Run, metric: str) -> Mapping[str, Any] | None:
    """The reward or monitor of a metric NAME, NAME/DETAIL, VIEW:NAME or VIEW:NAME/DETAIL."""
    for text in (metric, metric.partition(":")[2]):
        names = [name for name in run.scores if text == name or text.startswith(f"{name}/")]
        if names:
            return run.scores[max(names, key=len)]
    return None


def _from_plugin_file(run: Run, use: str) -> bool:
    """Whether the run's copy of its plugin file provides the reward: whether it states the name.
    A copy that cannot be read is taken to."""
    if not run.plugin_file or PLUGIN_FILE not in run.plugins:
        return False
    owner, _, name = use.rpartition(":")
    if owner:
        return owner == PLUGIN_FILE
    try:
        tree = ast.parse((run.folder / PLUGIN_FILE).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return True
    return any(isinstance(node, ast.Constant) and node.value == name for node in ast.walk(tree))


def _check_starts(runs: Sequence[Run], metrics: Sequence[str]) -> list[str]:
    """A note on the other metrics in which runs from scratch began differently.

    Raises:
        UserError: one of the metrics is among them.
    """
    known: dict[str, Run] = {}
    others: dict[str, None] = {}
    for run in (run for run in runs if not run.staged):
        for name in run.metric_names:
            before = known.setdefault(name, run)
            one, two = (float(x.evaluations[0][name]) for x in (before, run))
            if abs(one - two) <= SAME_START * max(1.0, abs(one), abs(two)):
                continue
            if name in metrics:
                raise UserError(
                    _apart(f"the first evaluation's {name}", (before, one), (run, two))
                    + ". The first evaluations differ: other weights behind the same name, or a "
                    "metric that is not deterministic"
                )
            others[name] = None
    if not others:
        return []
    return [
        f"the first evaluations also differ in {', '.join(others)}: other options behind the same "
        "name, or a metric that is not deterministic"
    ]


def _versions(runs: Sequence[Run]) -> list[str]:
    """A note on every distribution, and on the plugin file, that runs used in several versions."""
    found: dict[str, dict[str, Run]] = {}
    for run in runs:
        for name, version in run.plugins.items():
            mark = run.plugin_file[:8] if name == PLUGIN_FILE else version
            found.setdefault(name, {}).setdefault(mark, run)
    return [
        f"{name} differs between runs: "
        + ", ".join(f"{version} in {shown(run.folder)}" for version, run in versions.items())
        for name, versions in found.items()
        if len(versions) > 1
    ]
