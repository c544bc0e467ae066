"""``unigrpo check --memory``: what a step of a recipe takes, as a table. Loads no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from unigrpo_core.cli.text import table
from unigrpo_core.errors import PluginError, UserError
from unigrpo_core.loading import said
from unigrpo_core.recipe import Resolved
from unigrpo_core.recipe.schema import Recipe
from unigrpo_core.recipe.slots import PolicySlot
from unigrpo_core.recipe.workload import workload
from unigrpo_core.workload import Account, Calls, Work, Workload

PEAKS = (790e12, 4.3e12)
"""FLOP/s of bfloat16 matrix products and bytes/s of a copy, measured once on one H200."""

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def take(resolved: Resolved, prompt_tokens: int) -> Account | str:
    """The account of the recipe's policy, or why there is none.

    Raises:
        UserError: the recipe and the policy's sizes do not fit.
        PluginError: the policy's provider fails.
    """
    slot = resolved.recipe.policy
    found = _without(slot) or _account(slot, workload(resolved.recipe, prompt_tokens))
    if isinstance(found, str):
        return found
    return replace(found, assumptions=(*found.assumptions, *_unknown(resolved.recipe)))


def _unknown(recipe: Recipe) -> list[str]:
    """What of the recipe's cost cannot be known before it runs, a sentence each."""
    found = []
    if recipe.group.equal != "keep":
        found.append(
            f'no prompt is dropped or sampled in place of one, as group.equal = "'
            f'{recipe.group.equal}" will'
        )
    if recipe.updates.turns:
        found.append("work is that of a step that trains both experts, not one of them in turn")
    return found


def _without(slot: PolicySlot) -> str:
    """Why a policy can have no account; empty: it can."""
    if slot.component.provider.account is None:
        return f"{slot.who} has no account of what it takes (see docs/plugins.md, Provider.account)"
    return ""


def _account(slot: PolicySlot, load: Workload) -> Account | str:
    """That of a policy, or of a part of one."""
    provider = slot.component.provider
    if provider.account is None:
        return _without(slot)
    parts = [partial(_account, slot.parts[name]) for name in provider.parts]
    try:
        found = provider.account(slot.options, load, *parts)
    except (UserError, PluginError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise PluginError(f"{slot.who} cannot give its account: {said(error)}") from error
    if not isinstance(found, Account | str):
        raise PluginError(f"{slot.who} gave {found!r}, not an Account")
    return found


def as_text(account: Account) -> str:
    """The tables, indented below the recipe's line."""
    parts = [_memory(account), _calls(account), _work(account)]
    parts.append("\n".join(f"assumed: {line}" for line in account.assumptions))
    text = "\n\n".join(part for part in parts if part)
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())


def as_json(account: Account) -> dict[str, Any]:
    calls = account.calls
    return {
        "model": account.model,
        "memory": [
            {"name": part.name, "bytes": int(part.bytes), "held": part.held, "note": part.note}
            for part in account.memory
        ],
        "rollout_bytes": int(account.peak("rollout")),
        "update_bytes": int(account.peak("update")),
        "total_bytes": int(account.total),
        "host_bytes": int(account.host),
        "network_calls": {
            "first_step": calls[0].total + calls[0].first_step if calls else 0,
            "step": _mean([one.total for one in calls]),
            "steps": [one.total for one in calls],
            "per_image": _per_image(account),
        },
        "work": {
            name: {
                "flops": work.flops,
                "bytes": work.bytes,
                "h200_seconds": work.seconds(*PEAKS),
            }
            for name, work in account.work.items()
        },
        "assumptions": list(account.assumptions),
    }


def _memory(account: Account) -> str:
    when = {"always": "", "rollout": "in the rollout", "update": "in the update", "host": "host"}
    rows = [("memory", "", "when", f"of {account.model}")]
    rows += [(p.name, _bytes(p.bytes), when[p.held], p.note) for p in account.memory]
    rows += [
        ("rollout", _bytes(account.peak("rollout")), "", "at most at once"),
        ("update", _bytes(account.peak("update")), "", "at most at once"),
        ("device", _bytes(account.total), "", "the larger of the two"),
    ]
    return _aligned(rows)


def _calls(account: Account) -> str:
    if not account.calls:
        return ""
    rows = [("network calls", "a step", "of one image at one time in one context")]
    for name in ("sampling", "old", "reference", "average", "update", "again"):
        mean = _mean([getattr(one, name) for one in account.calls])
        if mean:
            rows.append((NAMES.get(name, name), f"{mean:,.0f}", ""))
    totals = [one.total for one in account.calls]
    spread = "" if min(totals) == max(totals) else f"{min(totals):,.0f} to {max(totals):,.0f}"
    rows.append(("all", f"{_mean(totals):,.0f}", spread))
    first = next((one.first_step for one in account.calls if one.first_step), 0)
    if first:
        rows.append(("first step", f"{first:,.0f}", "more, to see that the reference stands still"))
    rows.append(("sampling an image", f"{_per_image(account):,.1f}", ""))
    return _aligned(rows)


NAMES = {"old": "old values", "average": "moving average", "again": "the trainer's own gap"}


def _work(account: Account) -> str:
    floors = {name: work.seconds(*PEAKS) for name, work in account.work.items()}
    where = f"at {PEAKS[0] / 1e12:.0f} TFLOP/s and {PEAKS[1] / 1e12:.1f} TB/s (one H200, bf16)"
    rows = [("work a step", "arithmetic", "moved", f"floor {where}")]
    rows += [
        (name, _scaled(work.flops, "FLOP"), _bytes(work.bytes), _seconds(floors[name]))
        for name, work in account.work.items()
    ]
    total = sum(account.work.values(), Work())
    moved = _bytes(total.bytes)
    rows.append(("all", _scaled(total.flops, "FLOP"), moved, _seconds(sum(floors.values()))))
    return _aligned(rows)


def _seconds(value: float) -> str:
    return f"{value:,.2f} s" if value >= 0.01 else f"{value * 1e3:,.2f} ms"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """The rows as a table whose numbers, the second column, end in one line."""
    width = max(len(row[1]) for row in rows)
    return table([(row[0], row[1].rjust(width), *row[2:]) for row in rows])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _per_image(account: Account) -> float:
    sampled: Sequence[Calls] = account.calls
    return _mean([one.sampling for one in sampled]) / account.images if account.images else 0.0


def _bytes(count: float) -> str:
    return _scaled(count, "B")


def _scaled(value: float, unit: str) -> str:
    """The value with one decimal, in the largest thousand of its unit that it has."""
    size, letter = next((u for u in UNITS if value >= u[0]), (1, ""))
    return f"{value / size:,.1f} {letter}{unit}" if letter else f"{value:.0f} {unit}"
