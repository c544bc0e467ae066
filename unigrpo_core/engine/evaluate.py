"""Evaluation: held-out prompts, fixed draws, deterministic denoising."""

from __future__ import annotations

from dataclasses import dataclass

from unigrpo_core.engine.checks import check_finite
from unigrpo_core.engine.rollout import Plan, sample
from unigrpo_core.engine.scoring import Scores, episodes, score
from unigrpo_core.engine.setup import Setup
from unigrpo_core.keys import Key
from unigrpo_core.records import RewardBatch


@dataclass(frozen=True, eq=False)
class Evaluated:
    """One episode per held-out prompt, and its scores."""

    batch: RewardBatch
    scores: Scores

    def means(self) -> dict[str, float]:
        """The mean of every reward and detail over the prompts."""
        columns = zip(self.scores.names, self.scores.values.T, strict=True)
        found = {name: float(values.double().mean()) for name, values in columns}
        further = {
            name: float(values.double().mean()) for name, values in self.scores.details.items()
        }
        return {**found, **further}


def evaluate(setup: Setup, count: int) -> Evaluated:
    """Scores the first ``count`` held-out prompts. The draws are the same in every run.

    Raises:
        UserError: the model has diverged.
        PluginError: a reward failed.
    """
    prompts = setup.source.held_out(count)
    plan = Plan((1,) * len(setup.recipe.episode), setup.evaluation)
    rollout = sample(setup, prompts, plan, Key(("evaluation",)))
    check_finite(rollout)
    batch = episodes(rollout, "evaluation")
    return Evaluated(batch, score(setup.rewards, batch, details=True))
