"""What is checked beside the work itself: prompts before a run folder exists, and samples."""

from __future__ import annotations

from unigrpo_core.engine.gap import finite
from unigrpo_core.engine.setup import Setup
from unigrpo_core.errors import PluginError
from unigrpo_core.records import ImageSegment, Prompt, Rollout, TextSegment


def check_prompts(setup: Setup) -> None:
    """Whether the policy takes the held-out prompts to be used and those of the first rollout.

    Raises:
        UserError: it does not take one; the message says why.
    """
    recipe, options = setup.recipe, setup.recipe.evaluation
    during = options.prompts if options.every and options.every < recipe.steps else 0
    prompts = setup.source.held_out(max(options.final_prompts, during))
    if recipe.steps:
        prompts = (*prompts, *training_prompts(setup, 1))
    for prompt in prompts:
        setup.policy.prompt_tokens(prompt)


def training_prompts(setup: Setup, step: int) -> tuple[Prompt, ...]:
    """The prompts of a step's rollout.

    Raises:
        PluginError: the source gave another number than it was asked for.
    """
    recipe = setup.recipe
    prompts = setup.source.train(recipe.seed, (step - 1) * recipe.prompts, recipe.prompts)
    if len(prompts) != recipe.prompts:
        raise PluginError(
            f"{recipe.source.who} returned {len(prompts)} prompts for step {step}, "
            f"expected {recipe.prompts}"
        )
    return prompts


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
