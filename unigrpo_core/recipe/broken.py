"""What a rule says of a recipe that breaks it, and what rules ask of its slots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from unigrpo_core.errors import PluginError, UserError
from unigrpo_core.recipe.positions import KeyPath
from unigrpo_core.recipe.schema import Recipe, Segment
from unigrpo_core.recipe.slots import Slot

VIEWS: KeyPath = ("evaluation", "views")


@dataclass(frozen=True)
class Broken:
    """A rule that the recipe breaks, at a key; ``other`` is a key that the rule weighs it against:
    the one stated last is told."""

    path: KeyPath
    message: str
    plugin: bool = False
    other: KeyPath | None = None


Broke = Iterator[Broken]


class CannotBuildError(Exception):
    """A slot's component cannot be built, so what is asked of it cannot be told."""

    def __init__(self, broken: Broken) -> None:
        self.broken = broken


def built(slot: Slot, path: KeyPath) -> Any:
    """The slot's component, at its key.

    Raises:
        CannotBuildError: it cannot be built.
    """
    try:
        return slot.build()
    except UserError as error:
        raise CannotBuildError(Broken(path, str(error), isinstance(error, PluginError))) from error


def episodes(recipe: Recipe) -> Iterator[tuple[KeyPath, tuple[Segment, ...]]]:
    """The episodes that it states, each with its path: of training, of evaluation, of views."""
    yield ("episode",), recipe.episode
    if recipe.evaluation.episode is not None:
        yield ("evaluation", "episode"), recipe.evaluation.episode
    for place, view in enumerate(recipe.evaluation.views):
        if view.episode is not None:
            yield (*VIEWS, place, "episode"), view.episode
