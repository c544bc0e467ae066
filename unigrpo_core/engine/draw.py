"""Samples for one prompt, outside of any training."""

from __future__ import annotations

from pathlib import Path

from unigrpo_core.engine.rollout import Plan, sample
from unigrpo_core.engine.scoring import episodes
from unigrpo_core.engine.setup import build_setup
from unigrpo_core.engine.sheet import Card, pixels, write_sheet
from unigrpo_core.keys import Key
from unigrpo_core.recipe import Resolved
from unigrpo_core.records import Prompt


def draw_samples(resolved: Resolved, text: str, count: int, seed: int, out: Path) -> list[str]:
    """Writes a sheet of ``count`` episodes for the prompt and returns their thoughts.

    Raises:
        UserError: the policy does not understand the prompt.
    """
    setup = build_setup(resolved)
    prompt = Prompt("sample", text)
    setup.policy.prompt_tokens(prompt)
    fan_out = (count, *(1 for _ in resolved.recipe.episode[1:]))
    rollout = sample(setup, [prompt], Plan(fan_out, setup.evaluation), Key((seed, "sample")))
    batch = episodes(rollout, "sample")
    cards = [
        Card(text, thought, None if batch.images is None else pixels(batch.images[row]), ())
        for row, thought in enumerate(batch.thoughts)
    ]
    write_sheet(out, f"{resolved.name}, seed {seed}", [("samples", cards)])
    return list(batch.thoughts)
