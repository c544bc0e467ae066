"""What an ablation is made of: cells (a recipe with one value of every axis), and their runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unigrpo_core.recipe import toml_value
from unigrpo_core.recipe.emit import leaves
from unigrpo_core.recipe.resolve import ASIDE
from unigrpo_core.recipe.source import dotted


@dataclass(frozen=True)
class Cell:
    """A recipe with one value of every axis.

    Args:
        name: of its folder and in messages.
        recipe: its file, absolute.
        overrides: ``path=value`` texts, those of the axes last.
        values: as resolved, with the recipe's own seed.
        plugin_file: SHA-256 of the plugin file beside the recipe, empty if there is none.
        first: the cell whose run of the same seed comes first, if any.
    """

    name: str
    recipe: Path
    overrides: tuple[str, ...]
    values: Mapping[str, Any]
    plugin_file: str = ""
    first: Cell | None = None


@dataclass(frozen=True)
class Job:
    """One run: a cell with a seed, and its places below the folder of the ablation. Its ``mark``
    is there from its start until it is finished: what stands in its folder then is ours."""

    cell: Cell = field(repr=False)
    seed: int
    out: Path

    @property
    def name(self) -> str:
        return f"{self.cell.name} seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.out / self.cell.name / f"seed-{self.seed}"

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def mark(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.started")

    @property
    def values(self) -> dict[str, Any]:
        return {**self.cell.values, "seed": self.seed}

    @property
    def first(self) -> Job | None:
        """The run that this one starts from, if any."""
        return None if self.cell.first is None else Job(self.cell.first, self.seed, self.out)

    def words(self) -> list[str]:
        """What makes it, as words for ``unigrpo``."""
        overrides = [*self.cell.overrides, f"seed={self.seed}"]
        if self.first is not None:
            overrides.append(f"start={toml_value(str(self.first.folder.absolute()))}")
        sets = [word for override in overrides for word in ("--set", override)]
        return ["run", str(self.cell.recipe), "--out", str(self.folder), *sets]


def counted(values: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run, by dotted path: its recipe's values but for those in ASIDE, which are a
    title, and the recipe that comes first: of that a run has only the folder, its `start`."""
    kept = {key: value for key, value in values.items() if key not in ASIDE}
    return {dotted(path): value for path, value in leaves(kept)}
