"""Advantages with one fault each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kit_faults import Faults, drawing, unsteady
from unigrpo_core import testing
from unigrpo_core.interfaces import Advantage


class GoodAdvantage(Advantage):
    """Rewards less the mean of their group, in float64."""

    def __call__(self, rewards, weights, group, valid):
        total = (rewards.double().masked_fill(~valid[:, None], 0) * weights.double()).sum(1)
        found = torch.zeros(len(total), dtype=torch.float64)
        for number in group[valid].unique():
            rows = (group == number) & valid
            above = total[rows] - total[rows].min()
            found[rows] = above - above.mean()
        return found.float()


def advantages(change: Callable[..., Any]) -> Callable[..., Any]:
    def call(self, rewards, weights, group, valid):
        return change(GoodAdvantage.__call__(self, rewards, weights, group, valid), rewards, valid)

    return call


def by_number(self, rewards, weights, group, valid):
    found = GoodAdvantage.__call__(self, rewards, weights, group, valid)
    return found * group


def plain_mean(self, rewards, weights, group, valid):
    """In float32, over a floor that is too small: rounding becomes a signal."""
    total = (rewards * weights).sum(1)
    found = torch.zeros(len(total))
    for number in group.unique():
        rows = group == number
        gap = total[rows] - total[rows].sum() / rows.sum() * (1 + 1e-7)
        found[rows] = gap / (gap.std(correction=0) + 1e-8)
    return found


def unweighted(self, rewards, weights, group, valid):
    ones = torch.ones_like(weights)
    return GoodAdvantage.__call__(self, rewards, ones, group, valid)


def all_valid(self, rewards, weights, group, valid):
    every = torch.ones_like(valid)
    return GoodAdvantage.__call__(self, rewards, weights, group, every) * valid


advantage = Faults(testing.AdvantageConformance, GoodAdvantage)
advantage(
    "test_values_are_one_float32_per_row",
    "float64",
    __call__=advantages(lambda found, rewards, valid: found.double()),
)
advantage(
    "test_values_are_one_float32_per_row",
    "0 everywhere",
    __call__=advantages(lambda found, rewards, valid: 0 * found),
)
advantage(
    "test_groups_sum_to_zero",
    "sums to",
    __call__=advantages(lambda found, rewards, valid: found.clamp(-0.2, 1)),
)
advantage("test_equal_rewards_give_zero", "equal rewards gets", __call__=plain_mean)
advantage(
    "test_a_constant_changes_nothing",
    "not close",
    __call__=advantages(lambda found, rewards, valid: found / rewards.mean()),
)
advantage(
    "test_order_does_not_matter",
    "not close",
    __call__=advantages(lambda found, rewards, valid: found * torch.arange(len(found))),
)
advantage("test_order_does_not_matter", "not close", __call__=by_number)
advantage(
    "test_a_higher_reward_is_no_worse",
    "weight 1.0",
    __call__=advantages(lambda found, rewards, valid: -found),
)
advantage(
    "test_a_higher_reward_is_no_worse",
    "weight -1.0",
    __call__=lambda self, rewards, weights, group, valid: GoodAdvantage.__call__(
        self, rewards, weights.abs(), group, valid
    ),
)
advantage("test_weight_zero_counts_for_nothing", "not close", __call__=unweighted)
advantage("test_invalid_rows_count_for_nothing", "", __call__=all_valid)
advantage(
    "test_invalid_rows_count_for_nothing",
    "invalid rows of 100.0 get",
    __call__=advantages(lambda found, rewards, valid: found.where(valid, 1e-3)),
)
advantage(
    "test_nothing_is_drawn_or_changed", "of random;", __call__=drawing(GoodAdvantage.__call__)
)
advantage(
    "test_nothing_is_drawn_or_changed",
    "input: rows",
    __call__=advantages(lambda found, rewards, valid: (found, rewards.zero_())[0]),
)
advantage(
    "test_nothing_is_drawn_or_changed", "asked again", __call__=unsteady(GoodAdvantage.__call__)
)
advantage(
    "test_values_are_one_float32_per_row",
    r"\(9,\), expected",
    __call__=advantages(lambda found, rewards, valid: found[1:]),
)
advantage(
    "test_values_are_one_float32_per_row",
    "not finite",
    __call__=advantages(lambda found, rewards, valid: found / 0),
)
advantage(
    "test_a_higher_reward_is_no_worse",
    "advantages do not",
    __call__=advantages(lambda found, rewards, valid: 0 * found),
)
