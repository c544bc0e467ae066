"""How images are denoised, and what an evaluation samples."""

from __future__ import annotations

from dataclasses import dataclass

from unigrpo_core.errors import PluginError
from unigrpo_core.interfaces import Guidance, ImageFlowPolicy, Policy, Scheduler
from unigrpo_core.recipe import Recipe
from unigrpo_core.recipe.schema import Segment
from unigrpo_core.recipe.slots import SchedulerSlot, Slot


@dataclass(frozen=True, eq=False)
class Denoising:
    """How images are sampled: by which steps, at what noise, under which guidance."""

    scheduler: Scheduler
    guidance: Guidance
    times: tuple[float, ...]  # steps + 1, from 1 to 0
    noise_level: float  # of the stochastic steps

    @property
    def steps(self) -> int:
        return len(self.times) - 1


@dataclass(frozen=True, eq=False)
class View:
    """An evaluation: of which episodes, and whether each prompt is drawn by another's thought. The
    main one has no name; the scores of another bear its name."""

    name: str
    episode: tuple[Segment, ...]
    denoising: Denoising | None
    swapped: bool

    def label(self, score: str) -> str:
        """The name of a score in this view."""
        return f"{self.name}:{score}" if self.name else score


def build_views(policy: Policy, recipe: Recipe) -> tuple[View, ...]:
    """Every view of a recipe, the main one first."""
    found = []
    for view in recipe.views:
        episode = view.episode or ()
        plan = None
        if "draw" in episode:
            plan = denoising(policy, recipe, view.scheduler, view.guidance)
        found.append(View(view.name, episode, plan, view.thoughts == "swapped"))
    return tuple(found)


def denoising(
    policy: Policy, recipe: Recipe, slot: SchedulerSlot | None, guidance: Slot | None
) -> Denoising | None:
    """The parts built; None if they are not stated."""
    if slot is None or guidance is None:
        return None
    scheduler: Scheduler = slot.build()
    own = drawing(policy, recipe).time_shift(recipe.image.size)
    shift = own if slot.shift is None else slot.shift
    times = tuple(scheduler.times(slot.steps, shift).tolist())
    return Denoising(scheduler, guidance.build(), times, slot.noise_level)


def drawing(policy: Policy, recipe: Recipe) -> ImageFlowPolicy:
    """The policy as one that draws.

    Raises:
        PluginError: it does not, though its provider said so.
    """
    if not isinstance(policy, ImageFlowPolicy):
        raise PluginError(f"policy {recipe.policy.use!r} draws no images, as the episode does")
    return policy
