"""What is checked beside the work itself: prompts before a run folder exists, and samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from unigrpo_core.engine.gap import finite
from unigrpo_core.engine.setup import Setup
from unigrpo_core.errors import PluginError, UserError
from unigrpo_core.interfaces import PromptSource
from unigrpo_core.recipe import Recipe
from unigrpo_core.records import ImageSegment, Prompt, Rollout, TextSegment

LOOKED_AT = 4096  # prompts of the stream that are looked at before a run begins


def check_prompts(setup: Setup) -> list[str]:
    """Whether the policy takes the prompts to be used: the held-out ones, and those of the rollouts
    as far as ``LOOKED_AT``. No prompt is cut to fit. Returns what the user should know of them.

    Raises:
        UserError: it does not take some; the message counts them and says why of the first.
        PluginError: the source fails.
    """
    recipe, options = setup.recipe, setup.recipe.evaluation
    during = options.prompts if options.every and options.every < recipe.steps else 0
    wanted = max(options.final_prompts, during)
    prompts = list(_asked(setup, lambda s: s.held_out(wanted)))
    fewer = len(prompts) if len(prompts) < wanted else None
    for step in range(1, 1 + min(recipe.steps, -(-LOOKED_AT // recipe.prompts))):
        prompts += training_prompts(setup, step)
    different = {prompt.text: prompt for prompt in reversed(prompts)}
    refused: list[UserError] = []
    for prompt in reversed(different.values()):
        try:
            setup.policy.prompt_tokens(prompt)
        except UserError as error:
            refused.append(error)
    if len(refused) > 1:
        many = (
            f"{len(refused)} of the {len(different)} different prompts cannot be used; the first: "
        )
        raise UserError(f"{many}{refused[0]}") from refused[0]
    if refused:
        raise refused[0]
    if fewer is None:
        return []
    return [f"{recipe.source.who} holds {fewer} prompts out, so no evaluation has {wanted}"]


def training_prompts(setup: Setup, step: int) -> tuple[Prompt, ...]:
    """The prompts of a step's rollout.

    Raises:
        PluginError: the source fails, or gave another number than it was asked for.
    """
    recipe = setup.recipe
    start = (step - 1) * recipe.prompts
    prompts = _asked(setup, lambda s: s.train(recipe.seed, start, recipe.prompts))
    if len(prompts) != recipe.prompts:
        raise PluginError(
            f"{recipe.source.who} returned {len(prompts)} prompts for step {step}, "
            f"expected {recipe.prompts}"
        )
    return prompts


def _asked(
    setup: Setup, question: Callable[[PromptSource], tuple[Prompt, ...]]
) -> tuple[Prompt, ...]:
    """What the source answers; a failure is its plugin's."""
    try:
        return question(setup.source)
    except UserError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise PluginError(f"{setup.recipe.source.who} failed: {why}") from error


def check_finite(rollout: Rollout) -> None:
    """Whether the model still samples numbers, before a reward sees what it sampled.

    Raises:
        UserError: it has diverged.
    """
    for segment in rollout.segments:
        if isinstance(segment, TextSegment):
            finite("the model has diverged: a sampled log-prob", segment.logps[segment.mask])
        elif isinstance(segment, ImageSegment):
            finite("the model has diverged: a sampled latent", segment.latents)
            finite("the model has diverged: a decoded image", segment.images)


@contextmanager
def memory(recipe: Recipe) -> Iterator[None]:
    """Around whatever takes memory by the row.

    Raises:
        UserError: there is too little, on the device or here.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        kinds = (MemoryError, torch.OutOfMemoryError)
        if not isinstance(error, kinds) and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"out of memory: lower compute.rollout_rows (now {recipe.compute.rollout_rows}) or "
            f"compute.replay_tokens (now {recipe.compute.replay_tokens}), which change no draw; "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
