"""Rewards with one fault each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch

from kit_faults import Counted, Faults, drawing
from unigrpo_core import testing
from unigrpo_core.interfaces import Reward


class GoodReward(Reward):
    reads: ClassVar = frozenset({"image"})
    range: ClassVar = (0.0, 1.0)

    def score(self, batch):
        return batch.images.flatten(1).mean(1)

    def details(self, batch):
        return {"dark": 1 - self.score(batch)}


def plus(change: Callable[..., Any]) -> Callable[..., Any]:
    """A score to which a term of the batch is added."""
    return lambda self, batch: GoodReward.score(self, batch) * 0.5 + change(batch)


def share(texts: Any) -> torch.Tensor:
    return torch.tensor([len(text) / 100 for text in texts])


def count_up(self: Any, batch: Any) -> torch.Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    return GoodReward.score(self, batch) * 0.5**self.calls


def darken(self: Any, batch: Any) -> torch.Tensor:
    batch.images.mul_(0.9)
    return GoodReward.score(self, batch)


def by_rank(self: Any, batch: Any) -> torch.Tensor:
    return GoodReward.score(self, batch) * 0.5 + torch.arange(len(batch)) / 100


def scaled(self: Any, batch: Any) -> torch.Tensor:
    score = GoodReward.score(self, batch)
    return score / score.max().clamp(min=0.1) * 0.9


def over_thoughts(self: Any, batch: Any) -> torch.Tensor:
    return torch.tensor([1 / len(text) if text else float("nan") for text in batch.thoughts])


class Numbered(GoodReward):
    """Every one that is built scores differently."""

    built = Counted()

    def __init__(self):
        self.number = self.built()

    def score(self, batch):
        return super().score(batch) / self.number


reward = Faults(testing.RewardConformance, GoodReward)
reward("test_declarations", "reads .*'pixels'", reads=frozenset({"pixels"}))
reward("test_declarations", "frozenset", reads={"image"})
reward("test_declarations", "holds nothing", range=(1.0, 0.0))
reward("test_declarations", "", higher_is_better="yes")
reward(
    "test_score_is_one_float32_per_episode",
    "float64",
    score=lambda self, batch: GoodReward.score(self, batch).double(),
)
reward(
    "test_score_is_one_float32_per_episode",
    r"\(\), expected",
    score=lambda self, batch: GoodReward.score(self, batch).mean(),
)
reward(
    "test_score_is_one_float32_per_episode",
    "list",
    score=lambda self, batch: GoodReward.score(self, batch).tolist(),
)
reward("test_scores_are_in_range", "above 1.0", score=plus(lambda batch: 0.6))
reward("test_scores_are_in_range", "below 0.0", score=plus(lambda batch: -0.1))
reward(
    "test_scores_are_in_range",
    "not finite",
    score=lambda self, batch: GoodReward.score(self, batch) / batch.images.flatten(1).std(1) * 0.1,
)
reward("test_empty_thoughts_are_scored", "not finite", score=over_thoughts)
reward("test_rows_are_independent", "alone against together", score=scaled)
reward("test_order_does_not_matter", "in another order", score=by_rank)
reward("test_scores_are_repeatable", "second call", score=count_up)
reward("test_scores_are_repeatable", "second build", build=Numbered)
reward("test_nothing_global_is_drawn", "of random;", score=drawing(GoodReward.score))
reward("test_nothing_global_is_drawn", "of random;", details=drawing(GoodReward.details))
reward(
    "test_nothing_global_is_drawn",
    r"numpy\.random, torch",
    score=plus(lambda batch: 0 * (np.random.rand() + torch.rand(()))),
)
reward("test_inputs_are_left_alone", "input: batch", score=darken)
reward(
    "test_inputs_are_left_alone",
    "input: batch",
    score=plus(lambda batch: [p.metadata.update(seen=True) for p in batch.prompts] and 0.0),
)
for part, read in {
    "prompt": lambda batch: share(p.text for p in batch.prompts),
    "thought": lambda batch: share(batch.thoughts or [""] * len(batch)),
    "metadata": lambda batch: share(str(p.metadata) for p in batch.prompts),
}.items():
    reward("test_reads_no_more_than_it_says", f"the {part} changes", score=plus(read))
reward(
    "test_gradient_is_as_declared",
    "no gradient reaches",
    score=lambda self, batch: GoodReward.score(self, batch).detach(),
)
reward(
    "test_gradient_is_as_declared",
    "0 everywhere",
    score=lambda self, batch: 0 * GoodReward.score(self, batch),
)
reward("test_gradient_is_as_declared", "reaches the images of others", score=scaled)
reward(
    "test_gradient_is_as_declared",
    "not finite",
    score=lambda self, batch: (batch.images - batch.images.detach()).flatten(1).sum(1).sqrt(),
)
reward("test_details_are_further_scores", "list", details=lambda self, batch: {"x": [0.0]})
reward("test_details_are_further_scores", "returned NoneType", details=lambda self, batch: None)
reward(
    "test_details_are_further_scores",
    "not finite",
    details=lambda self, batch: {"x": GoodReward.score(self, batch).log()},
)
reward(
    "test_details_are_further_scores",
    "x, alone",
    details=lambda self, batch: {"x": scaled(self, batch)},
)
reward("test_declarations", "", facts={"differentiable": 1})
reward(
    "test_reads_no_more_than_it_says",
    "",
    score=plus(
        lambda batch: 0.1 * (batch.thoughts is None and not batch.prompts[0].text.startswith("a"))
    ),
)
reward(
    "test_details_are_further_scores", "no name", details=lambda self, batch: {1: self.score(batch)}
)
reward(
    "test_details_are_further_scores",
    r"x: \(\)",
    details=lambda self, batch: {"x": self.score(batch).mean()},
)
