"""From finished episodes to rewards, and from rewards to advantages per segment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from unigrpo_core.engine.faults import blamed, floats
from unigrpo_core.engine.setup import NamedReward, Setup
from unigrpo_core.errors import PluginError
from unigrpo_core.recipe import Recipe
from unigrpo_core.recipe.schema import EXPERT_OF
from unigrpo_core.records import ImageSegment, Prompt, RewardBatch, Rollout, TextSegment

T = TypeVar("T")

EQUAL = 1e-8  # total rewards that are nearer than this are the same


@dataclass(frozen=True, eq=False)
class Scores:
    """Rewards of the E episodes of a rollout, on the CPU."""

    names: tuple[str, ...]
    values: Tensor  # float32 [E, R]
    weights: Tensor  # float32 [R]
    details: Mapping[str, Tensor]  # float32 [E], named "reward/detail"

    @property
    def total(self) -> Tensor:
        """float32 [E]: the weighted sum, the same for rows that are. (That of a product of matrix
        and vector depends on where a row stands.)"""
        return (self.values.double() * self.weights.double()).sum(1).float()


def episodes(rollout: Rollout, label: str) -> RewardBatch:
    """The rollout as rewards see it; ``label`` makes the keys unique among rollouts."""
    last = len(rollout.segments) - 1
    count = len(rollout.parents[last])
    prompts = rollout.ancestors(last, -1).tolist()
    thoughts: tuple[str, ...] | None = None
    images: Tensor | None = None
    for level, segment in enumerate(rollout.segments):
        rows = rollout.ancestors(last, level) if level < last else torch.arange(count)
        if isinstance(segment, TextSegment):
            thoughts = tuple(segment.texts[row] for row in rows.tolist())
        elif isinstance(segment, ImageSegment):
            images = segment.images[rows.to(segment.images.device)]
    group = count // len(rollout.prompts)
    return RewardBatch(
        prompts=tuple(rollout.prompts[row] for row in prompts),
        thoughts=thoughts,
        images=images,
        keys=tuple(
            f"{label}/{rollout.prompts[row].id}/{i % group}" for i, row in enumerate(prompts)
        ),
    )


@torch.no_grad()
def score(rewards: tuple[NamedReward, ...], batch: RewardBatch, *, details: bool) -> Scores:
    """Scores the batch; ``details`` asks for the rewards' further scores too.

    Raises:
        PluginError: a reward fails, or returns what is no finite float per episode.
    """
    columns, further = [], {}
    for item in rewards:
        columns.append(_column(item, batch))
        if details:
            for name, values in _call(item, item.reward.details, batch).items():
                who = f"reward {item.name!r} of {item.origin} returned for detail {name!r}"
                further[f"{item.name}/{name}"] = _floats(who, values, batch)
    weights = torch.tensor(
        [item.weight if item.reward.higher_is_better else -item.weight for item in rewards]
    )
    return Scores(tuple(item.name for item in rewards), torch.stack(columns, 1), weights, further)


def graded(
    setup: Setup, told: tuple[tuple[Prompt, ...], tuple[str, ...] | None], latents: Tensor
) -> Tensor:
    """float32 [B, K] with gradient: the weighted sum of the rewards of the images of latents
    [B, K, *], whose rows have the prompts and thoughts ``told``.

    Raises:
        PluginError: a reward fails, or has no gradient though its provider says so.
    """
    rows, columns = latents.shape[:2]
    images = setup.image_policy.decode(latents.flatten(0, 1), setup.recipe.image.size)
    prompts, thoughts = told
    batch = RewardBatch(
        prompts=tuple(prompt for prompt in prompts for _ in range(columns)),
        thoughts=None if thoughts is None else tuple(t for t in thoughts for _ in range(columns)),
        images=images,
        keys=tuple(f"graded/{row}/{column}" for row in range(rows) for column in range(columns)),
    )
    total = torch.zeros(len(batch), device=images.device)
    for item in setup.rewards:
        if not item.weight:
            continue
        found = _call(item, item.reward.score, batch)
        if images.requires_grad and not found.requires_grad:
            raise PluginError(
                f"reward {item.name!r} of {item.origin} returned scores without gradient, though "
                "its provider says that it is differentiable"
            )
        sign = 1.0 if item.reward.higher_is_better else -1.0
        total = total + sign * item.weight * found.float().to(total.device)
    return total.view(rows, columns)


def _call(item: NamedReward, method: Callable[[RewardBatch], T], batch: RewardBatch) -> T:
    with blamed(f"reward {item.name!r} of {item.origin}"):
        return method(batch)


def _column(item: NamedReward, batch: RewardBatch) -> Tensor:
    who = f"reward {item.name!r} of {item.origin} returned"
    values = _floats(who, _call(item, item.reward.score, batch), batch)
    low, high = item.reward.range
    outside = values[(values < low - 1e-5) | (values > high + 1e-5)]
    if len(outside):
        raise PluginError(f"{who} {outside[0].item():.4g}, outside of its range [{low}, {high}]")
    return values


def _floats(who: str, values: object, batch: RewardBatch) -> Tensor:
    """What a reward returned as float32 [B] on the CPU; ``who`` begins the message if it is not
    one finite number per episode."""
    if not isinstance(values, Tensor) or values.shape != (len(batch),):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise PluginError(f"{who} {got}, expected a float tensor of ({len(batch)},)")
    values = values.detach().float().cpu()
    bad = (~torch.isfinite(values)).nonzero()[:, 0].tolist()
    if bad:
        prompt = batch.prompts[bad[0]]
        raise PluginError(
            f"{who} {values[bad[0]].item()} for {len(bad)} of {len(batch)} episodes, "
            f"first for prompt {prompt.id!r}: {prompt.text[:80]!r}"
        )
    return values


def advantages(setup: Setup, rollout: Rollout, scores: Scores, level: int) -> Tensor:
    """float32 [E_level]: the advantage of every row of a segment, from the mean over the episodes
    that descend from it, relative to its group."""
    recipe = setup.recipe
    assert recipe.advantage is not None
    last, above = len(rollout.segments) - 1, _group_level(recipe, level)
    if recipe.advantage.descendants == "mean_then_normalize":
        means = _descendants(rollout, scores.values, level).float()
        return _relative(setup, means, scores.weights, rollout.ancestors(level, above))
    found = _relative(setup, scores.values, scores.weights, rollout.ancestors(last, above))
    return _descendants(rollout, found, level).float()


def _relative(setup: Setup, rewards: Tensor, weights: Tensor, group: Tensor) -> Tensor:
    """The advantages of rewards [E, R], all of them valid.

    Raises:
        PluginError: they are not one finite number each.
    """
    slot = setup.recipe.advantage
    assert slot is not None
    assert setup.advantage is not None
    valid = torch.ones(len(group), dtype=torch.bool)
    found = floats(slot.who, setup.advantage(rewards, weights, group, valid), group.shape)
    if not torch.isfinite(found).all():
        raise PluginError(f"{slot.who} returned {found[~torch.isfinite(found)][0].item()}")
    return found


def equal_groups(recipe: Recipe, rollout: Rollout, scores: Scores) -> dict[str, float]:
    """For each trained expert the share of its groups whose segments all have the same total
    reward, each the mean over the episodes that descend from it: they teach it nothing."""
    found: dict[str, list[Tensor]] = {}
    for level, segment in enumerate(recipe.episode):
        if EXPERT_OF[segment] not in recipe.train:
            continue
        means = _descendants(rollout, scores.total, level)
        _, group = torch.unique(
            rollout.ancestors(level, _group_level(recipe, level)), return_inverse=True
        )
        blank = torch.zeros(int(group.max()) + 1, dtype=means.dtype)
        highest = blank.scatter_reduce(0, group, means, "amax", include_self=False)
        lowest = blank.scatter_reduce(0, group, means, "amin", include_self=False)
        found.setdefault(EXPERT_OF[segment], []).append(highest - lowest < EQUAL)
    return {f"{who}/equal_groups": float(torch.cat(x).double().mean()) for who, x in found.items()}


def _group_level(recipe: Recipe, level: int) -> int:
    """The level whose rows are the groups of a segment; -1: the prompts."""
    by = recipe.image.group_by if recipe.episode[level] == "draw" else recipe.text.group_by
    return -1 if by == "prompt" else level - 1


def _descendants(rollout: Rollout, values: Tensor, level: int) -> Tensor:
    """float64 [E_level, ...]: the mean of the episodes' values [E, ...] over those that descend
    from each row of a segment."""
    last, rows = len(rollout.segments) - 1, len(rollout.parents[level])
    owner = rollout.ancestors(last, level)
    sums = torch.zeros(rows, *values.shape[1:], dtype=torch.float64)
    sums.index_add_(0, owner, values.double())
    counts = torch.bincount(owner, minlength=rows).double()
    return sums / counts.view(-1, *[1] * (values.dim() - 1))
