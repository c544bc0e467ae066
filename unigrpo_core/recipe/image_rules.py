"""Rules on how images are sampled and what is trained of that."""

from __future__ import annotations

from unigrpo_core.interfaces import ImageObjective, Scheduler, Window
from unigrpo_core.keys import Key
from unigrpo_core.recipe.broken import Broke, Broken, built
from unigrpo_core.recipe.positions import KeyPath
from unigrpo_core.recipe.schema import Recipe
from unigrpo_core.recipe.slots import SchedulerSlot, Slot

ROLLOUTS = 1000
"""Rollouts whose windows are looked at, from the first on."""


def _window(recipe: Recipe) -> Broke:
    window, scheduler = recipe.image.window, recipe.image.scheduler
    if "draw" in recipe.episode and window and scheduler:
        try:
            built(window, ("image", "window")).count(scheduler.steps)
        except ValueError as error:
            yield Broken(("image", "window"), str(error))


def _stochastic(recipe: Recipe) -> Broke:
    scheduler, objective = recipe.image.scheduler, recipe.image.objective
    if "image" not in recipe.train or scheduler is None:
        return
    fresh = objective is not None and built(objective, ("image", "objective")).fresh
    divides: list[tuple[KeyPath, Slot]] = [
        (("image", "regularizers", place), slot)
        for place, slot in enumerate(recipe.image.regularizers)
        if "std" in slot.component.provider.needs and not fresh
    ]
    if objective and "std" in objective.component.provider.needs:
        divides.insert(0, (("image", "objective"), objective))
    why = _why_no_noise(scheduler) if divides else ""
    for path, slot in divides if why else ():
        message = (
            f"{slot.use!r} divides by the std of a step, and under image.scheduler "
            f"{scheduler.use!r} nothing would be stochastic: {why}"
        )
        yield Broken(path, message)


def _objective(recipe: Recipe) -> Broke:
    """What an image objective takes of the rest: noise, a unit, gradients of rewards."""
    slot, scheduler = recipe.image.objective, recipe.image.scheduler
    if "image" not in recipe.train or slot is None:
        return
    path: KeyPath = ("image", "objective")
    objective: ImageObjective = built(slot, path)
    for place, penalty in enumerate(recipe.image.regularizers):
        if objective.fresh and "std" in penalty.component.provider.needs:
            message = (
                f"{penalty.use!r} divides by the std of a step, and the points of image.objective "
                f"{slot.use!r} are its own, without noise; take one that reads velocities"
            )
            yield Broken(("image", "regularizers", place), message)
    unit = None if scheduler is None else built(scheduler, ("image", "scheduler")).unit
    if unit and objective.unit and objective.unit != unit:
        message = (
            f"the clip range of {slot.use!r} is in {objective.unit}, and log-ratios of "
            f"image.scheduler {scheduler and scheduler.use!r} are in {unit}: set clip_unit = "
            f'"{unit}", with a clip range of that size, or take another scheduler'
        )
        yield Broken(path, message)
    for place, reward in enumerate(recipe.rewards if "score" in objective.needs else ()):
        if reward.weight and not reward.component.provider.differentiable:
            message = (
                f"{reward.use!r} is not differentiable, and image.objective {slot.use!r} goes down "
                f"its gradient: take another reward, or weight = 0 and one that is, or another "
                "objective"
            )
            yield Broken(("rewards", place), message)


def _noise(recipe: Recipe) -> Broke:
    """What a scheduler can do: of noise so much, and perhaps none in the last step."""
    slot, window, objective = recipe.image.scheduler, recipe.image.window, recipe.image.objective
    if slot is None or "draw" not in recipe.episode:
        return
    scheduler: Scheduler = built(slot, ("image", "scheduler"))
    if slot.noise_level > scheduler.most_noise:
        message = (
            f"{slot.use!r} takes noise levels up to {scheduler.most_noise:g}, "
            f"got {slot.noise_level:g}"
        )
        yield Broken(("image", "scheduler", "noise_level"), message)
    trained = (*([objective] if objective else ()), *recipe.image.regularizers)
    divides = "image" in recipe.train and any(
        "std" in part.component.provider.needs for part in trained
    )
    if slot.noise_level and not scheduler.stochastic and not divides:
        message = f"{slot.use!r} has no noise, got {slot.noise_level:g}: leave it out"
        yield Broken(("image", "scheduler", "noise_level"), message)
    if scheduler.last_step or not divides or window is None:
        return
    chosen: Window = built(window, ("image", "window"))
    for step in range(1, min(recipe.steps, ROLLOUTS) + 1):
        key = Key((recipe.seed, "train", step)).child("window")
        if slot.steps - 1 in chosen.steps(slot.steps, key, step):
            message = (
                f"the last step of image.scheduler {slot.use!r} has no noise, and this window has "
                f"rollout {step} train on it; keep it to the steps before {slot.steps - 1}"
            )
            yield Broken(("image", "window"), message)
            return


def _why_no_noise(scheduler: SchedulerSlot) -> str:
    """Why no step under this scheduler has noise; empty if some may have."""
    if not built(scheduler, ("image", "scheduler")).stochastic:
        return "its std is always 0"
    return "" if scheduler.noise_level else "its noise_level is 0"


IMAGE_RULES = (_window, _stochastic, _objective, _noise)
