"""What is wrong with a recipe, said all at once with file and line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unigrpo_core.errors import PluginError, UserError, shown


@dataclass(frozen=True)
class Origin:
    """Where a value is stated. ``file`` is None for ``--set``, ``line`` None for a whole file."""

    file: Path | None
    line: int | None = None

    def __str__(self) -> str:
        if self.file is None:
            return "--set"
        return shown(self.file) if self.line is None else f"{shown(self.file)}:{self.line}"


@dataclass(frozen=True)
class Problem:
    """One thing to mend: the dotted ``path`` of the key ("" for a whole file), and what is wrong
    with it. ``plugin`` is True where a plugin is missing, ambiguous or at fault."""

    origin: Origin
    path: str
    message: str
    plugin: bool = False

    @property
    def file(self) -> Path | None:
        return self.origin.file

    @property
    def line(self) -> int | None:
        return self.origin.line

    def __str__(self) -> str:
        return ": ".join(filter(None, (str(self.origin), self.path, self.message)))


class RecipeError(UserError):
    """All that is wrong with a recipe, one problem per line."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        order = {file: place for place, file in enumerate(dict.fromkeys(p.file for p in problems))}
        self.problems = tuple(sorted(problems, key=lambda p: (order[p.file], p.line or 0)))
        plugins_only = all(problem.plugin for problem in problems)
        self.exit_code = PluginError.exit_code if plugins_only else 2
        super().__init__("\n".join(str(problem) for problem in self.problems))
