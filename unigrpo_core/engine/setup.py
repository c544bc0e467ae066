"""From a resolved recipe to the built parts of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from unigrpo_core.engine.allocator import keep_freed_memory
from unigrpo_core.errors import PluginError, UserError
from unigrpo_core.interfaces import (
    Advantage,
    FlowRegularizer,
    Guidance,
    ImageFlowPolicy,
    ImageObjective,
    Policy,
    PromptSource,
    Reward,
    Scheduler,
    TextObjective,
    TextPolicy,
    TokenRegularizer,
    Window,
)
from unigrpo_core.plugin import Placement
from unigrpo_core.recipe import Recipe, Resolved
from unigrpo_core.recipe.schema import SchedulerSlot, Slot

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


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
class NamedReward:
    """A reward with its weight and where it comes from."""

    name: str
    weight: float
    reward: Reward
    origin: str


@dataclass(frozen=True, eq=False)
class TextRegularizer:
    name: str
    weight: float
    anchor: str
    penalty: TokenRegularizer


@dataclass(frozen=True, eq=False)
class ImageRegularizer:
    name: str
    weight: float
    anchor: str
    on: str
    penalty: FlowRegularizer


@dataclass(frozen=True, eq=False)
class Setup:
    """The built parts. ``text`` and ``image`` parts are None or empty where not trained."""

    recipe: Recipe
    accelerator: Accelerator
    policy: Policy
    source: PromptSource
    rewards: tuple[NamedReward, ...]
    advantage: Advantage | None
    text_objective: TextObjective | None
    text_regularizers: tuple[TextRegularizer, ...]
    image_objective: ImageObjective | None
    image_regularizers: tuple[ImageRegularizer, ...]
    window: Window | None
    training: Denoising | None
    evaluation: Denoising | None

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def text_policy(self) -> TextPolicy:
        if not isinstance(self.policy, TextPolicy):
            raise PluginError(
                f"policy {self.recipe.policy.use!r} does not write, as the episode does"
            )
        return self.policy

    @property
    def image_policy(self) -> ImageFlowPolicy:
        return _draws(self.policy, self.recipe)


def build_setup(resolved: Resolved, tracking: Path | None = None) -> Setup:
    """Builds every component and loads the policy's weights; ``tracking`` is where a run's
    TensorBoard events will go.

    Raises:
        UserError: a device, file or checkpoint that is not there or does not fit.
        PluginError: a component that cannot be built.
    """
    recipe = resolved.recipe
    if recipe.compute.threads:
        torch.set_num_threads(recipe.compute.threads)
    accelerator = choose_device(recipe.compute.device, tracking)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    place = Placement(
        accelerator.device, PRECISIONS[recipe.compute.precision], frozenset(recipe.train)
    )
    policy: Policy = recipe.policy.build(place)
    if recipe.start:
        policy.load(Path(recipe.start) / "final")
    text, image = recipe.text, recipe.image
    train_text, train_image = "text" in recipe.train, "image" in recipe.train
    setup = Setup(
        recipe=recipe,
        accelerator=accelerator,
        policy=policy,
        source=recipe.source.build(),
        rewards=_rewards(recipe),
        advantage=_optional(recipe.advantage),
        text_objective=_optional(text.objective) if train_text else None,
        text_regularizers=tuple(
            TextRegularizer(slot.use, slot.weight, slot.anchor, slot.build())
            for slot in text.regularizers
            if train_text and slot.weight
        ),
        image_objective=_optional(image.objective) if train_image else None,
        image_regularizers=tuple(
            ImageRegularizer(slot.use, slot.weight, slot.anchor, slot.on, slot.build())
            for slot in image.regularizers
            if train_image and slot.weight
        ),
        window=_optional(image.window) if "draw" in recipe.episode else None,
        training=_denoising(policy, recipe, image.scheduler, image.guidance),
        evaluation=_denoising(
            policy, recipe, recipe.evaluation.scheduler, recipe.evaluation.guidance
        ),
    )
    _check_policy(setup)
    return setup


def choose_device(wanted: str, tracking: Path | None) -> Accelerator:
    """An accelerator on the wanted device, or on the best there is.

    Raises:
        UserError: the device is not here, or the run is spread over several processes.
    """
    kind = wanted.partition(":")[0]
    present = {
        "auto": True,
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present[kind]:
        raise UserError(f"compute.device is {wanted!r}, but torch finds none here; try 'auto'")
    if kind == "cuda" and ":" in wanted:
        torch.cuda.set_device(wanted)
    accelerator = Accelerator(
        cpu=kind == "cpu",
        mixed_precision="no",
        log_with=None if tracking is None else "tensorboard",
        project_dir=tracking,
    )
    if accelerator.num_processes > 1:
        raise UserError(
            f"launched as {accelerator.num_processes} processes; training runs in one for now"
        )
    return accelerator


def _optional(slot: Slot | None) -> Any:
    return None if slot is None else slot.build()


def _rewards(recipe: Recipe) -> tuple[NamedReward, ...]:
    named: list[NamedReward] = []
    for slot in recipe.rewards:
        twins = sum(item.name.partition("#")[0] == slot.use for item in named)
        name = f"{slot.use}#{twins + 1}" if twins else slot.use
        named.append(NamedReward(name, slot.weight, slot.build(), slot.component.origin))
    return tuple(named)


def _denoising(
    policy: Policy, recipe: Recipe, slot: SchedulerSlot | None, guidance: Slot | None
) -> Denoising | None:
    if slot is None or guidance is None or "draw" not in recipe.episode:
        return None
    scheduler: Scheduler = slot.build()
    own = _draws(policy, recipe).time_shift(recipe.image.size)
    shift = own if slot.shift is None else slot.shift
    times = tuple(scheduler.times(slot.steps, shift).tolist())
    return Denoising(scheduler, guidance.build(), times, slot.noise_level)


def _draws(policy: Policy, recipe: Recipe) -> ImageFlowPolicy:
    if not isinstance(policy, ImageFlowPolicy):
        raise PluginError(f"policy {recipe.policy.use!r} draws no images, as the episode does")
    return policy


def _check_policy(setup: Setup) -> None:
    """What only the loaded policy can tell, before the first rollout."""
    recipe, experts = setup.recipe, setup.policy.parameters()
    if "think" in recipe.episode:
        assert setup.text_policy
    if "draw" in recipe.episode:
        setup.image_policy.latent_shape(recipe.image.size)
    for expert in recipe.train:
        if not any(p.requires_grad for p in experts.get(expert, {}).values()):
            raise UserError(
                f"train names {expert!r}, but that expert of policy {recipe.policy.use!r} has no "
                "trainable parameter; check the policy's options"
            )
