"""One rollout, scored, and made ready for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from unigrpo_core.engine.checks import check_draws, check_finite, check_steps, training_prompts
from unigrpo_core.engine.clock import Clock
from unigrpo_core.engine.cuts import cut_texts
from unigrpo_core.engine.rollout import Plan, sample
from unigrpo_core.engine.scoring import Scores, advantages, episodes, score
from unigrpo_core.engine.selection import Sampled, select
from unigrpo_core.engine.setup import Setup
from unigrpo_core.engine.trainset import TrainSet, build_train_set
from unigrpo_core.keys import Key
from unigrpo_core.recipe.schema import EXPERT_OF
from unigrpo_core.records import Prompt, Rollout


@dataclass(frozen=True, eq=False)
class Experience:
    """What is trained on, and all that was sampled for it with counts of its prompts."""

    rollout: Rollout
    scores: Scores
    data: TrainSet
    sampled: Sampled
    counts: Mapping[str, float]
    cut: Mapping[str, float]
    """See :func:`unigrpo_core.engine.cuts.cut_texts`."""


def gather(setup: Setup, step: int, clock: Clock) -> Experience:
    """Samples the episodes of a step, scores them, and lays them out for the update.

    Raises:
        UserError: the model has diverged, or the episodes of the first step share their draws.
        PluginError: the source or a reward fails.
    """
    recipe, key = setup.recipe, Key((setup.recipe.seed, "train", step))
    first = _sampled(setup, training_prompts(setup, step), step, key.child("episode"), clock)
    if step == 1:
        check_draws(first.rollout)
    kept, sampled, counts = select(
        recipe,
        first,
        lambda number: _sampled(
            setup, training_prompts(setup, step, number), step, key.child("further", number), clock
        ),
    )
    rollout, scores = kept.rollout, kept.scores
    with clock.phase("update"):
        trained = recipe.trained(step)
        found = tuple(
            advantages(setup, rollout, scores, level) if EXPERT_OF[segment] in trained else None
            for level, segment in enumerate(recipe.episode)
        )
        data = build_train_set(setup, rollout, found, scores.total, key)
    cut = cut_texts(setup, episodes(sampled.rollout, f"{recipe.seed}/{step}"))
    return Experience(rollout, scores, data, sampled, counts, cut)


def _sampled(setup: Setup, prompts: Sequence[Prompt], step: int, key: Key, clock: Clock) -> Sampled:
    """The episodes of prompts, with their scores."""
    recipe = setup.recipe
    trained: tuple[int, ...] = ()
    if setup.window is not None and setup.training is not None:
        window = Key((recipe.seed, "train", step)).child("window")
        trained = setup.window.steps(setup.training.steps, window, step)
        check_steps(setup, trained, setup.training.steps)
    plan = Plan(recipe.episode, recipe.group.fan_out, setup.training, trained)
    by = setup.policy.weights("ema") if recipe.ema.sample else nullcontext()
    with by:
        rollout = sample(setup, prompts, plan, key, clock)
    check_finite(rollout)
    with clock.phase("reward"):
        batch = episodes(rollout, f"{recipe.seed}/{step}")
        return Sampled(rollout, score(setup.rewards, batch, details=False))
