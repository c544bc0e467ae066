"""Samples for one prompt, outside of any training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unigrpo_core.engine.checks import check_finite
from unigrpo_core.engine.cuts import cut_texts, said_of_cuts
from unigrpo_core.engine.faults import told
from unigrpo_core.engine.folder import check_place
from unigrpo_core.engine.rollout import Plan, sample
from unigrpo_core.engine.scoring import episodes
from unigrpo_core.engine.setup import Setup, with_policy
from unigrpo_core.engine.sheet import Card, pixels, write_sheet
from unigrpo_core.errors import UserError
from unigrpo_core.interfaces import PromptSource
from unigrpo_core.keys import Key
from unigrpo_core.recipe import Resolved
from unigrpo_core.records import Prompt

FORMATS = (".png", ".jpg", ".jpeg", ".webp")


class Given(PromptSource):
    """No source but one prompt, which is all that sampling takes."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt

    def train(self, seed: int, start: int, count: int) -> tuple[Prompt, ...]:
        return (self.prompt,) * count

    def held_out(self, count: int) -> tuple[Prompt, ...]:
        return (self.prompt,)[:count]


@dataclass(frozen=True)
class Drawn:
    """The thoughts of what was drawn, None if it did not think; and who cut how many of the texts
    that it was drawn of."""

    thoughts: tuple[str, ...] | None
    cuts: tuple[str, ...]


def draw_samples(resolved: Resolved, text: str, count: int, seed: int, out: Path) -> Drawn:
    """Writes a sheet of ``count`` episodes for the prompt, sampled as in evaluation. Rewards and
    the recipe's source are not built.

    Raises:
        UserError: ``out`` cannot be written, or the policy does not understand the prompt.
    """
    _check_place(out)
    prompt = Prompt("sample", text)
    setup = with_policy(resolved.recipe, Given(prompt))
    with told(resolved.recipe):
        return _drawn(resolved, setup, prompt, count, seed, out)


def _drawn(
    resolved: Resolved, setup: Setup, prompt: Prompt, count: int, seed: int, out: Path
) -> Drawn:
    view, recipe = setup.views[0], setup.recipe
    setup.policy.prompt_tokens(prompt, recipe.text.max_tokens if "think" in view.episode else 0)
    fan_out = (count, *(1 for _ in view.episode[1:]))
    plan = Plan(view.episode, fan_out, view.denoising, noise_scope="episode")
    rollout = sample(setup, [prompt], plan, Key((seed, "sample")))
    check_finite(rollout)
    batch = episodes(rollout, "sample")
    cards = [
        Card(
            prompt.text,
            None if batch.thoughts is None else batch.thoughts[row],
            None if batch.images is None else pixels(batch.images[row]),
            (),
        )
        for row in range(len(batch))
    ]
    write_sheet(out, f"{resolved.name}, seed {seed}", [("samples", cards)])
    return Drawn(batch.thoughts, tuple(said_of_cuts(cut_texts(setup, batch))))


def _check_place(out: Path) -> None:
    """Whether a picture can be written there, before a model is loaded."""
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"{out} names no picture; end it in {', '.join(FORMATS)}")
    if out.is_dir():
        raise UserError(f"{out} is a folder; choose another place with --out")
    check_place(out)
