"""What the scores of a run are called: by the ``use`` of their reward or monitor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from unigrpo_core.recipe.schema import Recipe
from unigrpo_core.recipe.slots import MonitorSlot


def scored(recipe: Recipe) -> dict[str, MonitorSlot]:
    """Every reward and then every monitor by its name; a monitor that is one of the rewards is
    scored as that."""
    same = [(slot.component, slot.options) for slot in recipe.rewards]
    monitors = [slot for slot in recipe.monitors if (slot.component, slot.options) not in same]
    slots: list[MonitorSlot] = [*recipe.rewards, *monitors]
    return dict(zip(_names(slot.use for slot in slots), slots, strict=True))


def score_names(
    values: Mapping[str, Any],
) -> dict[str, tuple[Mapping[str, Any], Literal["reward", "monitor"]]]:
    """The same of a resolved recipe's plain values, as a run folder has them: by name the slot and
    which of the two it is."""
    rewards, monitors = values.get("rewards", ()), values.get("monitors", ())
    same = [_component(slot) for slot in rewards]
    kinds: list[tuple[Mapping[str, Any], Literal["reward", "monitor"]]] = [
        *((slot, "reward") for slot in rewards),
        *((slot, "monitor") for slot in monitors if _component(slot) not in same),
    ]
    return dict(zip(_names(str(slot["use"]) for slot, _ in kinds), kinds, strict=True))


def _component(slot: Mapping[str, Any]) -> dict[str, Any]:
    """A slot without what does not change its score: whose it is, as ``distribution:name`` says,
    and its weight."""
    kept = {key: value for key, value in slot.items() if key != "weight"}
    return {**kept, "use": str(slot["use"]).rpartition(":")[2]}


def _names(uses: Iterable[str]) -> list[str]:
    """The words, the second of equal ones with #2 behind it, and so on."""
    seen: dict[str, int] = {}
    names = []
    for use in uses:
        seen[use] = seen.get(use, 0) + 1
        names.append(use if seen[use] == 1 else f"{use}#{seen[use]}")
    return names
