"""From a resolved recipe to the built parts of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from unigrpo_core.engine.allocator import keep_freed_memory
from unigrpo_core.engine.faults import blamed
from unigrpo_core.engine.penalty import checked
from unigrpo_core.engine.views import Denoising, View, build_views, denoising, drawing
from unigrpo_core.errors import PluginError, UserError
from unigrpo_core.interfaces import (
    Advantage,
    FlowRegularizer,
    ImageFlowPolicy,
    ImageObjective,
    Policy,
    PromptSource,
    Reward,
    TextObjective,
    TextPolicy,
    TokenRegularizer,
    Window,
)
from unigrpo_core.plugin import Placement
from unigrpo_core.recipe import Recipe, Resolved
from unigrpo_core.recipe.scored import scored
from unigrpo_core.recipe.slots import RewardSlot, Slot

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


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
    """The built parts. ``text`` and ``image`` parts are None or empty where not trained; the first
    of the views is the evaluation itself."""

    recipe: Recipe
    accelerator: Accelerator
    device: torch.device
    policy: Policy
    source: PromptSource
    rewards: tuple[NamedReward, ...]
    monitors: tuple[NamedReward, ...]
    advantage: Advantage | None
    text_objective: TextObjective | None
    text_regularizers: tuple[TextRegularizer, ...]
    image_objective: ImageObjective | None
    image_regularizers: tuple[ImageRegularizer, ...]
    window: Window | None
    training: Denoising | None
    views: tuple[View, ...]

    @property
    def text_policy(self) -> TextPolicy:
        if not isinstance(self.policy, TextPolicy):
            raise PluginError(
                f"policy {self.recipe.policy.use!r} does not write, as the episode does"
            )
        return self.policy

    @property
    def image_policy(self) -> ImageFlowPolicy:
        return drawing(self.policy, self.recipe)


def build_setup(resolved: Resolved, tracking: Path | None = None) -> Setup:
    """Builds every component and loads the policy's weights; ``tracking`` is where a run's
    TensorBoard events will go.

    Raises:
        UserError: a device, file or checkpoint that is not there or does not fit, a source
            without held-out prompts, or a reward that reads what the episode does not have.
        PluginError: a component that cannot be built.
    """
    recipe = resolved.recipe
    if recipe.after and not recipe.start:
        raise UserError(
            f"{resolved.name} starts where a run of {recipe.after} ends: name that run's folder "
            "with --set start=FOLDER, or let `unigrpo ablate` run both"
        )
    source: PromptSource = recipe.source.build()
    rewards, monitors = _rewards(recipe)
    _check_held_out(recipe, source)
    _check_reads(recipe, rewards, monitors)
    return with_policy(recipe, source, rewards, monitors, tracking)


def with_policy(
    recipe: Recipe,
    source: PromptSource,
    rewards: tuple[NamedReward, ...] = (),
    monitors: tuple[NamedReward, ...] = (),
    tracking: Path | None = None,
) -> Setup:
    """Builds the rest, the policy first; with no reward and nothing to train that is what
    sampling takes.

    Raises:
        UserError: a device, file or checkpoint that is not there or does not fit.
        PluginError: a component that cannot be built.
    """
    if recipe.compute.threads:
        torch.set_num_threads(recipe.compute.threads)
    accelerator, device = choose_device(recipe.compute.device, tracking)
    if device.type == "cpu":
        keep_freed_memory()
    compute = recipe.compute
    place = Placement(
        device,
        PRECISIONS[compute.precision],
        frozenset(recipe.train),
        checkpointing=compute.checkpointing,
        compile=compute.compile,
        cuda_graphs=compute.cuda_graphs,
        reference=compute.reference,
    )
    policy: Policy = recipe.policy.build(place)
    if recipe.start:
        _load(recipe, policy, Path(recipe.start) / "final")
    text, image = recipe.text, recipe.image
    train_text, train_image = "text" in recipe.train, "image" in recipe.train
    setup = Setup(
        recipe=recipe,
        accelerator=accelerator,
        device=device,
        policy=policy,
        source=source,
        rewards=rewards,
        monitors=monitors,
        advantage=_optional(recipe.advantage) if recipe.train else None,
        text_objective=_optional(text.objective) if train_text else None,
        text_regularizers=tuple(
            TextRegularizer(
                slot.use, slot.weight, slot.compares_with, checked(slot.who, slot.build())
            )
            for slot in text.regularizers
            if train_text and slot.weight
        ),
        image_objective=_optional(image.objective) if train_image else None,
        image_regularizers=tuple(
            ImageRegularizer(
                slot.use, slot.weight, slot.compares_with, slot.on, checked(slot.who, slot.build())
            )
            for slot in image.regularizers
            if train_image and slot.weight
        ),
        window=_optional(image.window) if "draw" in recipe.episode else None,
        training=denoising(policy, recipe, image.scheduler, image.guidance)
        if "draw" in recipe.episode
        else None,
        views=build_views(policy, recipe),
    )
    _check_policy(setup)
    return setup


def choose_device(wanted: str, tracking: Path | None) -> tuple[Accelerator, torch.device]:
    """An accelerator and the device: the wanted one; for ``auto`` CUDA if there is any, else the
    CPU.

    Raises:
        UserError: the device is not here, this process already works on another, or the launch
            asks for what training does not do.
    """
    device = _device(wanted)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no",
            log_with=None if tracking is None else "tensorboard",
            project_dir=tracking,
        )
    except ValueError as error:
        raise UserError(f"compute.device is {wanted!r}, but accelerate says: {error}") from error
    kept: torch.device = accelerator.device
    if kept.type != device.type or kept.index not in (None, device.index):
        raise UserError(
            f"compute.device is {wanted!r}, but accelerate keeps this process on {kept}; start "
            "another process, without ACCELERATE_USE_CPU and ACCELERATE_TORCH_DEVICE"
        )
    if accelerator.num_processes > 1:
        raise UserError(
            f"launched as {accelerator.num_processes} processes; training runs in one for now"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            "accelerate would divide gradients by "
            f"{accelerator.gradient_accumulation_steps} accumulation steps, but an update is one "
            "step here; unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
        )
    return accelerator, device


def _device(wanted: str) -> torch.device:
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, _, index = wanted.partition(":")
    if kind == "cpu" or (kind == "auto" and not present):
        return torch.device("cpu")
    if not present:
        raise UserError(f"compute.device is {wanted!r}, but torch finds none here; try 'auto'")
    number = int(index) if index else torch.cuda.current_device()
    if number >= present:
        raise UserError(
            f"compute.device is {wanted!r}, but the last one here is 'cuda:{present - 1}'"
        )
    return torch.device("cuda", number)


def _optional(slot: Slot | None) -> Any:
    return None if slot is None else slot.build()


def _load(recipe: Recipe, policy: Policy, folder: Path) -> None:
    """Continues from another run's weights, which may be damaged in ways of their own."""
    with blamed(f"{recipe.policy.who}, loading {folder},"):
        policy.load(folder)


def _rewards(recipe: Recipe) -> tuple[tuple[NamedReward, ...], tuple[NamedReward, ...]]:
    """The rewards and the monitors."""
    named = []
    for name, slot in scored(recipe).items():
        weight = slot.weight if isinstance(slot, RewardSlot) else 0.0
        named.append(NamedReward(name, weight, slot.build(), slot.component.origin))
    count = len(recipe.rewards)
    return tuple(named[:count]), tuple(named[count:])


def _check_held_out(recipe: Recipe, source: PromptSource) -> None:
    """Whether there is a prompt to evaluate on."""
    if not source.held_out(1):
        raise UserError(
            f"source {recipe.source.use!r} holds no prompt out, so nothing could be evaluated; "
            "look at the options in 'source' (of the source 'file': a source.held_out_fraction "
            "above 0, or a source.held_out_path)"
        )


READS = {"thought": "think", "image": "draw"}  # what a reward may read, and the segment it is in


def _check_reads(
    recipe: Recipe, rewards: tuple[NamedReward, ...], monitors: tuple[NamedReward, ...]
) -> None:
    """Whether the episodes have what they read who score them."""
    evaluated = {
        f"the episode of view {view.name!r}" if view.name else "the evaluated episode": view.episode
        for view in recipe.views
    }
    asked = [(item, {"the episode": recipe.episode, **evaluated}) for item in rewards]
    asked += [(item, evaluated) for item in monitors]
    for item, ways in asked:
        for part, segment in READS.items():
            for which, episode in ways.items():
                if part in item.reward.reads and segment not in (episode or ()):
                    raise UserError(
                        f"reward {item.name!r} of {item.origin} reads the {part}, but {which} "
                        f"{list(episode or ())} has no {segment!r} segment"
                    )


def _check_policy(setup: Setup) -> None:
    """What only the loaded policy can tell, before the first rollout."""
    recipe, experts = setup.recipe, setup.policy.parameters()
    episodes = [recipe.episode, *(view.episode for view in setup.views)]
    if any("think" in episode for episode in episodes):
        assert setup.text_policy
    if any("draw" in episode for episode in episodes):
        setup.image_policy.latent_shape(recipe.image.size)
    for expert in recipe.train:
        owned = {name: p for name, p in experts.get(expert, {}).items() if p.requires_grad}
        if not owned:
            raise UserError(
                f"train names {expert!r}, but that expert of policy {recipe.policy.use!r} has no "
                "trainable parameter; check the policy's options"
            )
        for name, p in owned.items():
            if torch.finfo(p.dtype).eps > torch.finfo(torch.float32).eps:
                rate = (recipe.text if expert == "text" else recipe.image).lr
                least = torch.finfo(p.dtype).eps * float(p.detach().abs().float().mean())
                raise UserError(
                    f"the {expert} expert would train {name} in {p.dtype}, whose numbers there are "
                    f"{least:.0e} apart, and a step of the learning rate {rate:.0e} "
                    f"{'can get' if rate > least else 'gets'} lost between them; keep trainable "
                    "weights in float32 (compute.precision says what is computed in)"
                )
