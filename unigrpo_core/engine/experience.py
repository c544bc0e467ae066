"""One rollout, scored, and made ready for training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unigrpo_core.engine.checks import check_draws, check_finite, training_prompts
from unigrpo_core.engine.clock import Clock
from unigrpo_core.engine.cuts import cut_texts
from unigrpo_core.engine.rollout import Plan, sample
from unigrpo_core.engine.scoring import Scores, advantages, episodes, score
from unigrpo_core.engine.setup import Setup
from unigrpo_core.engine.trainset import TrainSet, build_train_set
from unigrpo_core.keys import Key
from unigrpo_core.recipe.schema import EXPERT_OF
from unigrpo_core.records import Rollout


@dataclass(frozen=True, eq=False)
class Experience:
    rollout: Rollout
    scores: Scores
    data: TrainSet
    cut: Mapping[str, float]
    """See :func:`unigrpo_core.engine.cuts.cut_texts`."""


def gather(setup: Setup, step: int, clock: Clock) -> Experience:
    """Samples the episodes of a step, scores them, and lays them out for the update.

    Raises:
        UserError: the model has diverged, or the episodes of the first step share their draws.
        PluginError: the source or a reward fails.
    """
    recipe, key = setup.recipe, Key((setup.recipe.seed, "train", step))
    prompts = training_prompts(setup, step)
    trained: tuple[int, ...] = ()
    if setup.window is not None and setup.training is not None:
        trained = setup.window.steps(setup.training.steps, key.child("window"))
    plan = Plan(recipe.episode, recipe.group.fan_out, setup.training, trained)
    rollout = sample(setup, prompts, plan, key.child("episode"), clock)
    check_finite(rollout)
    if step == 1:
        check_draws(rollout)
    with clock.phase("reward"):
        batch = episodes(rollout, f"{recipe.seed}/{step}")
        scores = score(setup.rewards, batch, details=False)
    with clock.phase("update"):
        found = tuple(
            advantages(setup, rollout, scores, level)
            if EXPERT_OF[segment] in recipe.train
            else None
            for level, segment in enumerate(recipe.episode)
        )
        data = build_train_set(setup, rollout, found, scores.total, key)
    return Experience(rollout, scores, data, cut_texts(setup, batch))
