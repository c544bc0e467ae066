"""Which layers a name means that a recipe gives adapters to. Without torch."""

from __future__ import annotations

from collections.abc import Sequence

from unigrpo_core.errors import UserError


def bind(expert: str, targets: Sequence[str], layers: Sequence[str]) -> list[str]:
    """The layers of an expert that the targets name: by a whole path or by its last parts, with or
    without the expert's suffix.

    Raises:
        UserError: a target names none.
    """
    bound: dict[str, None] = {}
    for target in targets:
        named = [name for name in layers if f".{target}" in _endings(name)]
        if not named:
            words = sorted({_short(_plain(name)) for name in layers})
            raise UserError(
                f"policy.lora_{expert} names {target!r}, which is no linear layer of the {expert} "
                f"expert; its layers are: {', '.join(words)}"
            )
        bound |= dict.fromkeys(named)
    return list(bound)


def _endings(name: str) -> set[str]:
    found = set()
    for path in (name, _plain(name)):
        parts = path.split(".")
        found |= {"." + ".".join(parts[start:]) for start in range(len(parts))}
    return found


def _short(name: str) -> str:
    """The end of a path that tells: a number does not."""
    *above, last = name.split(".")
    return f"{above[-1]}.{last}" if above and last.isdigit() else last


def _plain(name: str) -> str:
    return name.replace("_moe_gen", "")
