"""Prompts whose episodes all have the same reward: dropped, and others sampled in their place.

What is sampled is counted whole, whatever is trained on: a curve of rewards over the kept prompts
alone would leave out those that are solved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unigrpo_core.engine.rollout import join, rows_of
from unigrpo_core.engine.scoring import EQUAL, Scores
from unigrpo_core.recipe import Recipe
from unigrpo_core.records import Rollout


@dataclass(frozen=True, eq=False)
class Sampled:
    """A rollout and its scores."""

    rollout: Rollout
    scores: Scores


def select(
    recipe: Recipe, first: Sampled, another: Callable[[int], Sampled]
) -> tuple[Sampled, Sampled, dict[str, float]]:
    """What is trained on, all that was sampled, and counts of prompts.

    Args:
        another: samples further prompts, for round 1, 2, ...
    """
    if recipe.group.equal == "keep":
        return first, first, {}
    sampled, kept = [first], [_kept(first)]
    rounds = recipe.group.resample_rounds if recipe.group.equal == "resample" else 0
    for number in range(1, rounds + 1):
        if sum(map(len, kept)) >= recipe.prompts:
            break
        sampled.append(another(number))
        kept.append(_kept(sampled[-1]))
    left, chosen = recipe.prompts, []
    for one, rows in zip(sampled, kept, strict=True):
        if len(rows[:left]):
            chosen.append(_of(one, rows[:left]))
        left -= len(rows[:left])
    counts = {
        "groups/requested": float(sum(len(one.rollout.prompts) for one in sampled)),
        "groups/kept": float(recipe.prompts - left),
    }
    # Where nothing differs the advantages are 0 throughout: the step trains on penalties alone.
    return _joined(chosen) if chosen else first, _joined(sampled), counts


def _kept(one: Sampled) -> Tensor:
    """The prompts, by row, whose episodes differ in their total reward."""
    totals = one.scores.total.view(len(one.rollout.prompts), -1)
    return (totals.amax(1) - totals.amin(1) >= EQUAL).nonzero()[:, 0]


def _of(one: Sampled, prompts: Tensor) -> Sampled:
    """The part of these prompts."""
    rollout, segments, count = one.rollout, [], len(one.rollout.prompts)
    for segment, rows in zip(rollout.segments, _below(rollout, prompts), strict=True):
        segments.append(rows_of(segment, rows))
    widths = [len(parents) // count for parents in rollout.parents]
    episodes = list(_below(rollout, prompts))[-1]
    scores = one.scores
    return Sampled(
        Rollout(
            tuple(rollout.prompts[row] for row in prompts.tolist()),
            tuple(segments),
            tuple(_parents(len(prompts), widths)),
        ),
        Scores(scores.names, scores.values[episodes], scores.weights, {}),
    )


def _below(rollout: Rollout, prompts: Tensor) -> Iterator[Tensor]:
    """The rows of each segment that descend from these prompts."""
    for parents in rollout.parents:
        each = len(parents) // len(rollout.prompts)
        yield (prompts[:, None] * each + torch.arange(each)).flatten()


def _parents(prompts: int, widths: Sequence[int]) -> Iterator[Tensor]:
    """The parents of a forest; ``widths`` are rows per prompt of each segment."""
    above = 1
    for width in widths:
        yield torch.arange(prompts * above).repeat_interleave(width // above)
        above = width


def _joined(parts: Sequence[Sampled]) -> Sampled:
    if len(parts) == 1:
        return parts[0]
    rollouts, first = [part.rollout for part in parts], parts[0].scores
    prompts = tuple(prompt for rollout in rollouts for prompt in rollout.prompts)
    widths = [len(parents) // len(rollouts[0].prompts) for parents in rollouts[0].parents]
    segments = zip(*(rollout.segments for rollout in rollouts), strict=True)
    return Sampled(
        Rollout(
            prompts,
            tuple(join(segment) for segment in segments),
            tuple(_parents(len(prompts), widths)),
        ),
        Scores(first.names, torch.cat([p.scores.values for p in parts]), first.weights, {}),
    )
