"""What is said of the cells of an ablation before one of them runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from unigrpo_core.ablation.alike import world
from unigrpo_core.ablation.cells import differing
from unigrpo_core.ablation.jobs import Cell, counted

SHOWN = 3  # names that a note shows at most


def notes(cells: Sequence[Cell]) -> Iterator[str]:
    """Whether `unigrpo compare` will refuse them, and which take more than one thread."""
    apart = differing([world(counted(cell.values)) for cell in cells])
    if apart:
        yield f"these cells differ in {_listed(apart)}, so compare will not put them into one table"
    busy: dict[int, list[str]] = {}
    for cell in cells:
        busy.setdefault(cell.values["compute"]["threads"], []).append(cell.name)
    for threads, names in busy.items():
        if threads > 1:
            use = "uses" if len(names) == 1 else "use"
            yield (
                f"{_listed(names)} {use} compute.threads = {threads}; runs side by side then "
                "compete"
            )


def _listed(names: Sequence[str]) -> str:
    if len(names) > SHOWN:
        return f"{', '.join(names[:SHOWN])} and {len(names) - SHOWN} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
