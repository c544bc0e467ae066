"""Evaluation: held-out prompts, fixed draws, deterministic denoising."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from unigrpo_core.engine.checks import check_finite
from unigrpo_core.engine.cuts import cut_texts
from unigrpo_core.engine.rollout import Plan, sample
from unigrpo_core.engine.scoring import Scores, episodes, score
from unigrpo_core.engine.setup import Setup
from unigrpo_core.engine.views import View
from unigrpo_core.keys import Key
from unigrpo_core.records import Prompt, RewardBatch, TextSegment

KEY = Key(("evaluation",))


@dataclass(frozen=True, eq=False)
class Evaluated:
    """One episode per held-out prompt, and its scores, in one view."""

    view: View
    batch: RewardBatch
    scores: Scores
    cut: Mapping[str, float]  # see unigrpo_core.engine.cuts, labelled as the means are

    def means(self) -> dict[str, float]:
        """The mean of every reward, monitor and detail over the prompts."""
        columns = zip(self.scores.names, self.scores.values.T, strict=True)
        found = {**dict(columns), **self.scores.details}
        return {self.view.label(n): float(values.double().mean()) for n, values in found.items()}


def evaluate(setup: Setup, count: int, view: View) -> Evaluated:
    """Scores the first ``count`` held-out prompts by the rewards and the monitors. The draws are
    the same in every run and, as far as they sample the same, in every view.

    Raises:
        UserError: the model has diverged.
        PluginError: a reward failed.
    """
    prompts = setup.source.held_out(count)
    thoughts = _swapped(setup, prompts) if view.swapped else None
    ones = (1,) * len(view.episode)
    plan = Plan(view.episode, ones, view.denoising, thoughts=thoughts, noise_scope="prompt")
    rollout = sample(setup, prompts, plan, KEY)
    check_finite(rollout)
    batch = episodes(rollout, "evaluation")
    scores = score((*setup.rewards, *setup.monitors), batch, details=True)
    cut = {view.label(name): value for name, value in cut_texts(setup, batch).items()}
    return Evaluated(view, batch, scores, cut)


def _swapped(setup: Setup, prompts: Sequence[Prompt]) -> TextSegment:
    """For each prompt the thought of the one before it."""
    (thoughts,) = sample(setup, prompts, Plan(("think",), (1,), None), KEY).segments
    assert isinstance(thoughts, TextSegment)
    return thoughts.rows(torch.arange(len(prompts)).roll(1))
