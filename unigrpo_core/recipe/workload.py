"""From a recipe to what a step of it amounts to. Builds the light objects of methods only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

from unigrpo_core.interfaces import Guidance, ImageObjective, Scheduler, Window
from unigrpo_core.keys import Key
from unigrpo_core.recipe.image_rules import ROLLOUTS
from unigrpo_core.recipe.schema import Recipe
from unigrpo_core.recipe.slots import RegularizerSlot
from unigrpo_core.workload import PROMPT_TOKENS, Workload


def workload(recipe: Recipe, prompt_tokens: int = PROMPT_TOKENS) -> Workload:
    """A training step of a recipe whose prompts have so many tokens, system prompt included.

    Raises:
        UserError: a method cannot be built.
        PluginError: likewise.
    """
    thoughts = recipe.prompts * recipe.group.fan_out[0] if "think" in recipe.episode else 0
    draws = "draw" in recipe.episode
    images = recipe.prompts * prod(recipe.group.fan_out) if draws else 0
    text, image, compute = recipe.text, recipe.image, recipe.compute
    train_text, train_image = "text" in recipe.train, "image" in recipe.train
    windows = _windows(recipe) if draws else ()
    guidance: Guidance | None = image.guidance.build() if draws and image.guidance else None
    objective: ImageObjective | None = (
        image.objective.build() if train_image and image.objective else None
    )
    needs = objective.needs if objective else frozenset()
    rows = thoughts or recipe.prompts
    return Workload(
        prompts=recipe.prompts,
        rows=rows,
        thoughts=thoughts,
        images=images,
        fan_out=images // rows,
        max_tokens=text.max_tokens,
        prompt_tokens=prompt_tokens,
        size=image.size,
        steps=image.scheduler.steps if draws and image.scheduler else 0,
        points=objective.count(len(windows[0])) if windows and objective else 0,
        windows=windows,
        shared_noise=image.noise_scope != "episode" and images > rows,
        branches=len(guidance.branches) if guidance else 0,
        guided=partial(_guided, recipe, guidance),
        updates=recipe.updates.count,
        disjoint=recipe.updates.data == "disjoint",
        train=frozenset(recipe.train),
        scored=train_text and text.objective is not None,
        reference_text=train_text and _anchored(text.regularizers, "reference"),
        reference_image=train_image
        and (_anchored(image.regularizers, "reference") or "reference" in needs),
        context_gradient=image.context_gradient,
        signal=recipe.optimizer.signal_every > 0,
        rollout_rows=compute.rollout_rows,
        rollout_images=compute.rollout_images or compute.rollout_rows,
        replay_tokens=compute.replay_tokens,
        precision=compute.precision,
        checkpointing=compute.checkpointing,
        reference_on=compute.reference,
        fresh=objective is not None and objective.fresh,
        averaged=recipe.ema.decay > 0,
        average_samples=recipe.ema.sample,
        average_text=train_text and _anchored(text.regularizers, "ema"),
        average_image=train_image and (_anchored(image.regularizers, "ema") or "ema" in needs),
        draws=tuple("image" in recipe.trained(step) for step in range(1, len(windows) + 1)),
    )


def _anchored(slots: Sequence[RegularizerSlot], anchor: str) -> bool:
    return any(slot.compares_with == anchor for slot in slots if slot.weight)


def _windows(recipe: Recipe) -> tuple[tuple[int, ...], ...]:
    """The stochastic steps of the run's rollouts, drawn as the engine draws them; those of the
    first where it takes none."""
    slot, steps = recipe.image.window, recipe.image.scheduler
    rollouts = range(1, max(1, min(recipe.steps, ROLLOUTS)) + 1)
    if slot is None or steps is None:
        return ((),) * len(rollouts)
    window: Window = slot.build()
    keys = {step: Key((recipe.seed, "train", step)).child("window") for step in rollouts}
    return tuple(window.steps(steps.steps, key, step) for step, key in keys.items())


def _guided(recipe: Recipe, guidance: Guidance | None, own: float) -> tuple[bool, ...]:
    slot = recipe.image.scheduler
    if slot is None:
        return ()
    if guidance is None or not guidance.branches:
        return (False,) * slot.steps
    scheduler: Scheduler = slot.build()
    times = scheduler.plain_times(slot.steps, own if slot.shift is None else slot.shift)
    if times is None:
        return (True,) * slot.steps
    return tuple(guidance.guides(time) for time in times[:-1])
