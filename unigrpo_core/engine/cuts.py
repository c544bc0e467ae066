"""Texts that a painter does not read to their end, counted: a policy may cut them, never unseen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from unigrpo_core.interfaces import ImageFlowPolicy
from unigrpo_core.records import Prompt, RewardBatch

if TYPE_CHECKING:
    from unigrpo_core.engine.setup import Setup

SHARE, MOST = "cut_texts", "cut_tokens"


def cut_texts(setup: Setup, batch: RewardBatch) -> dict[str, float]:
    """Of images drawn: the share whose text was cut (``cut_texts/NAME``) and the most tokens that
    one lost (``cut_tokens/NAME``), for each reader that cuts; nothing of a policy that does not."""
    if batch.images is None:
        return {}
    thoughts = batch.thoughts or ("",) * len(batch)
    texts = [(p.text, thought) for p, thought in zip(batch.prompts, thoughts, strict=True)]
    prompts = dict(zip(texts, batch.prompts, strict=True))
    found = _lost(setup, ((prompt, thought) for (_, thought), prompt in prompts.items()))
    figures: dict[str, float] = {}
    for name, counts in found.items():
        lost = dict(zip(prompts, counts, strict=True))
        figures[f"{SHARE}/{name}"] = sum(lost[text] > 0 for text in texts) / len(texts)
        figures[f"{MOST}/{name}"] = float(max(counts))
    return figures


def cut_prompts(setup: Setup, prompts: Sequence[Prompt]) -> list[str]:
    """What the user should know of prompts that are cut before anything is thought of them."""
    episodes = (setup.recipe.episode, *(view.episode for view in setup.views))
    if not any("draw" in episode for episode in episodes):
        return []
    found = _lost(setup, ((prompt, "") for prompt in prompts))
    said = [
        f"{name} leaves out the end of {sum(n > 0 for n in counts)} of the {len(prompts)} "
        f"different prompts, at most {max(counts)} tokens of one"
        for name, counts in found.items()
        if any(counts)
    ]
    return [f"{setup.recipe.policy.who} cuts texts: {'; '.join(said)}"] if said else []


def is_cut(name: str) -> bool:
    """Whether a figure is one of :func:`cut_texts`, in any view."""
    return name.rpartition(":")[2].startswith((f"{SHARE}/", f"{MOST}/"))


def said_of_cuts(figures: Mapping[str, float]) -> list[str]:
    """For the console: who has cut how many texts."""
    return [
        f"{name.rpartition('/')[2]} cuts {share:.0%} of the texts"
        for name, share in figures.items()
        if name.startswith(f"{SHARE}/") and share
    ]


def _lost(setup: Setup, texts: Iterable[tuple[Prompt, str]]) -> dict[str, list[int]]:
    """By reader what each text of prompt and thought loses; of a policy that cuts none, nothing is
    asked but the first."""
    policy = setup.policy
    assert isinstance(policy, ImageFlowPolicy)
    found: dict[str, list[int]] = {}
    for prompt, thought in texts:
        lost = policy.cut_tokens(prompt, thought)
        if not lost:
            return {}
        for name, count in lost.items():
            found.setdefault(name, []).append(count)
    return found
