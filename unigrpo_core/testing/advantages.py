"""What every advantage keeps: see ``Advantage`` in :mod:`unigrpo_core.interfaces`."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from unigrpo_core.interfaces import Advantage
from unigrpo_core.recipe.slots import AdvantageSlot
from unigrpo_core.testing.base import Conformance
from unigrpo_core.testing.samples import uniform
from unigrpo_core.testing.watch import no_global_draws, unchanged

GROUP = (4, 9, 4, 9, 4, 7, 9, 4, 9, 7)
"""Groups of 4, 4 and 2 rows, mixed, by numbers that are not 0, 1, 2."""


class AdvantageConformance(Conformance):
    """Checks of an advantage.

    Facts:
        centres: whether the advantages of a group sum to 0.
        tolerance: how far rounding may move an advantage.
    """

    slot = AdvantageSlot
    centres: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-5

    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """rewards [E, R], weights [R], group [E] and valid [E], all of them valid."""
        group = torch.tensor(GROUP)
        weights = torch.tensor([1.0, 0.5])
        return uniform("rewards", len(group), 2), weights, group, torch.ones(len(group)).bool()

    def close(self, got: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(got, expected, atol=self.tolerance, rtol=self.tolerance)

    def only_centred(self) -> None:
        if not self.centres:
            pytest.skip("it does not centre, and says so")

    def test_values_are_one_float32_per_row(self, component: Advantage) -> None:
        """Finite float32 [E], not 0 everywhere."""
        found = component(*self.rows())
        assert found.shape == (len(GROUP),), f"{tuple(found.shape)}, expected ({len(GROUP)},)"
        assert found.dtype == torch.float32, f"{found.dtype}"
        assert torch.isfinite(found).all(), f"not finite: {found.tolist()}"
        assert found.any(), "0 everywhere for rewards that differ"

    def test_groups_sum_to_zero(self, component: Advantage) -> None:
        """Within a group advantages sum to 0; if ``centres``."""
        self.only_centred()
        rewards, weights, group, valid = self.rows()
        found = component(rewards, weights, group, valid)
        for number in set(GROUP):
            total = found[group == number].double().sum().item()
            assert abs(total) <= 10 * self.tolerance, f"group {number} sums to {total}"

    def test_equal_rewards_give_zero(self, component: Advantage) -> None:
        """Exactly 0 to every row of a group whose rewards are all equal, and to one that is alone:
        divided by a spread near 0, a rest of rounding would pass for a signal; if ``centres``."""
        self.only_centred()
        rewards, weights, group, valid = self.rows()
        rewards[group == 4] = torch.tensor([0.1, 0.7])
        group[5], rewards[9] = 11, torch.tensor([0.3, 0.3])  # 11 and 7 have one row each
        found = component(rewards, weights, group, valid)
        for number in (4, 7, 11):
            rows = found[group == number]
            assert not rows.any(), f"group {number} of equal rewards gets {rows.tolist()}"

    def test_a_constant_changes_nothing(self, component: Advantage) -> None:
        """What is added to all rewards is taken off again; if ``centres``."""
        self.only_centred()
        rewards, weights, group, valid = self.rows()
        before = component(rewards, weights, group, valid)
        found = component(rewards + 2.0, weights, group, valid)
        torch.testing.assert_close(found, before, atol=1e-4, rtol=1e-4)

    def test_order_does_not_matter(self, component: Advantage) -> None:
        """Advantages follow their rows, and a group may have any number."""
        rewards, weights, group, valid = self.rows()
        before = component(rewards, weights, group, valid)
        order = torch.tensor([7, 2, 9, 0, 4, 1, 8, 3, 6, 5])
        self.close(component(rewards[order], weights, group[order], valid[order]), before[order])
        self.close(component(rewards, weights, 1000 - 3 * group, valid), before)

    def test_a_higher_reward_is_no_worse(self, component: Advantage) -> None:
        """Within a group advantages rise with the reward, and fall where its weight is negative."""
        rewards, _, group, valid = self.rows()
        rewards = rewards[:, :1]
        for sign in (1.0, -1.0):
            found = component(rewards, torch.tensor([sign]), group, valid)
            for number in set(GROUP):
                here = group == number
                order = (sign * rewards[here, 0]).argsort()
                steps = found[here][order].diff()
                assert (steps >= 0).all(), f"group {number}, weight {sign}: {steps.tolist()}"
                assert steps.any(), f"group {number}: rewards differ, advantages do not"

    def test_weight_zero_counts_for_nothing(self, component: Advantage) -> None:
        """A reward of weight 0 is shown, and out of the advantage."""
        rewards, _, group, valid = self.rows()
        weights = torch.tensor([1.0, 0.0])
        before = component(rewards, weights, group, valid)
        other = rewards.clone()
        other[:, 1] = 5.0 - 3.0 * other[:, 1]
        self.close(component(other, weights, group, valid), before)

    def test_invalid_rows_count_for_nothing(self, component: Advantage) -> None:
        """They get 0, and the others what they would get without them, whatever their rewards."""
        rewards, weights, group, valid = self.rows()
        valid[[1, 4, 9]] = False
        kept = component(rewards[valid], weights, group[valid], valid[valid])
        for wrong in (100.0, float("nan"), float("inf")):
            odd = rewards.clone()
            odd[~valid] = wrong
            found = component(odd, weights, group, valid)
            assert not found[~valid].any(), f"invalid rows of {wrong} get {found[~valid].tolist()}"
            self.close(found[valid], kept)

    def test_nothing_is_drawn_or_changed(self, component: Advantage) -> None:
        """No global draw, no input changed, alike when asked again."""
        rows = self.rows()
        with no_global_draws(), unchanged(rows=rows):
            first, again = (component(*rows) for _ in range(2))
        assert torch.equal(first, again), "other advantages when asked again"
