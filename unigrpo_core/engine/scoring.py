"""From finished episodes to rewards, and from rewards to advantages per segment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from unigrpo_core.engine.setup import NamedReward, Setup
from unigrpo_core.errors import PluginError, UserError
from unigrpo_core.records import ImageSegment, RewardBatch, Rollout, TextSegment

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Scores:
    """Rewards of the E episodes of a rollout, on the CPU."""

    names: tuple[str, ...]
    values: Tensor  # float32 [E, R]
    weights: Tensor  # float32 [R]
    details: Mapping[str, Tensor]  # float32 [E], named "reward/detail"

    @property
    def total(self) -> Tensor:
        """float32 [E]: the weighted sum."""
        return self.values @ self.weights


def episodes(rollout: Rollout, label: str) -> RewardBatch:
    """The rollout as rewards see it; ``label`` makes the keys unique among rollouts."""
    last = len(rollout.segments) - 1
    count = len(rollout.parents[last])
    prompts = rollout.ancestors(last, -1).tolist()
    thoughts: list[str] = [""] * count
    images: Tensor | None = None
    for level, segment in enumerate(rollout.segments):
        rows = rollout.ancestors(last, level) if level < last else torch.arange(count)
        if isinstance(segment, TextSegment):
            thoughts = [segment.texts[row] for row in rows.tolist()]
        elif isinstance(segment, ImageSegment):
            images = segment.images[rows.to(segment.images.device)]
    group = count // len(rollout.prompts)
    return RewardBatch(
        prompts=tuple(rollout.prompts[row] for row in prompts),
        thoughts=tuple(thoughts),
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
                further[f"{item.name}/{name}"] = values.float().cpu()
    weights = torch.tensor(
        [item.weight if item.reward.higher_is_better else -item.weight for item in rewards]
    )
    return Scores(tuple(item.name for item in rewards), torch.stack(columns, 1), weights, further)


def _call(item: NamedReward, method: Callable[[RewardBatch], T], batch: RewardBatch) -> T:
    try:
        return method(batch)
    except UserError:
        raise
    except Exception as error:
        raise PluginError(
            f"reward {item.name!r} of {item.origin} failed: {type(error).__name__}: {error}"
        ) from error


def _column(item: NamedReward, batch: RewardBatch) -> Tensor:
    values: object = _call(item, item.reward.score, batch)
    who = f"reward {item.name!r} of {item.origin}"
    if not isinstance(values, Tensor) or values.shape != (len(batch),):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise PluginError(f"{who} returned {got}, expected a float tensor of ({len(batch)},)")
    values = values.detach().float().cpu()
    bad = (~torch.isfinite(values)).nonzero()[:, 0].tolist()
    if bad:
        prompt = batch.prompts[bad[0]]
        raise PluginError(
            f"{who} returned {values[bad[0]].item()} for {len(bad)} of {len(batch)} episodes, "
            f"first for prompt {prompt.id!r}: {prompt.text[:80]!r}"
        )
    low, high = item.reward.range
    outside = values[(values < low - 1e-5) | (values > high + 1e-5)]
    if len(outside):
        raise PluginError(
            f"{who} returned {outside[0].item():.4g}, outside of its range [{low}, {high}]"
        )
    return values


def advantages(setup: Setup, rollout: Rollout, scores: Scores, level: int) -> Tensor:
    """float32 [E_level]: the advantage of every row of a segment, from the mean over the episodes
    that descend from it, relative to its group."""
    recipe, advantage = setup.recipe, setup.advantage
    assert advantage is not None
    assert recipe.advantage is not None
    by = recipe.image.group_by if recipe.episode[level] == "draw" else recipe.text.group_by
    group_level = -1 if by == "prompt" else level - 1
    last, rows = len(rollout.segments) - 1, len(rollout.parents[level])
    owner = rollout.ancestors(last, level) if level < last else torch.arange(rows)

    def descend(values: Tensor) -> Tensor:
        sums = torch.zeros(rows, *values.shape[1:], dtype=torch.float64)
        sums.index_add_(0, owner, values.double())
        counts = torch.bincount(owner, minlength=rows).double()
        return (sums / counts.view(-1, *[1] * (values.dim() - 1))).float()

    if recipe.advantage.descendants == "mean_then_normalize":
        group = rollout.ancestors(level, group_level)
        valid = torch.ones(rows, dtype=torch.bool)
        return advantage(descend(scores.values), scores.weights, group, valid)
    group = rollout.ancestors(last, group_level)
    valid = torch.ones(len(group), dtype=torch.bool)
    return descend(advantage(scores.values, scores.weights, group, valid))


def equal_groups(rollout: Rollout, scores: Scores) -> float:
    """The share of prompts whose episodes all have the same total reward: they teach nothing."""
    group = scores.total.view(len(rollout.prompts), -1)
    return float((group.max(1).values - group.min(1).values < 1e-8).float().mean())
