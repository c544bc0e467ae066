"""Leave-one-out, GDPO and percentiles by hand, and where they are the group-relative advantage."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from unigrpo_methods.advantages import gdpo, group_norm, leave_one_out

METHODS = {one.PROVIDER.name: one.PROVIDER for one in (gdpo, group_norm, leave_one_out)}
NAN, INF = float("nan"), float("inf")


def advantages(
    name: str,
    rewards: list[list[float]] | Tensor,
    group: list[int],
    weights: tuple[float, ...] = (1.0,),
    valid: list[bool] | None = None,
    **options: Any,
) -> list[float]:
    provider = METHODS[name]
    result = provider.build(provider.options.model_validate(options))(
        torch.as_tensor(rewards),
        torch.tensor(weights),
        torch.tensor(group),
        torch.tensor([True] * len(group) if valid is None else valid),
    )
    assert result.dtype == torch.float32
    return result.tolist()


ROWS, GROUPS = [[1.0], [10.0], [3.0], [10.0], [5.0], [16.0]], [7, 2, 7, 2, 7, 2]


# --- leave one out ----------------------------------------------------------------------------


def test_leave_one_out_by_hand() -> None:
    # Group 7 (1, 3, 5): the others' means are 4, 3, 2. Group 2 (10, 10, 16): 13, 13, 10.
    found = advantages("leave_one_out", ROWS, GROUPS)
    assert found == pytest.approx([-3.0, -3.0, 0.0, -3.0, 3.0, 6.0], abs=1e-6)
    clipped = advantages("leave_one_out", ROWS, GROUPS, clip=4.0)
    assert clipped == pytest.approx([-3.0, -3.0, 0.0, -3.0, 3.0, 4.0], abs=1e-6)


def test_leave_one_out_adds_rewards_by_their_weights() -> None:
    # Sums 2, 2, 0: less the means of the others, 1, 1 and 2.
    rows = [[1.0, 0.0], [0.0, 4.0], [0.0, 0.0]]
    found = advantages("leave_one_out", rows, [0] * 3, (2.0, 0.5))
    assert found == pytest.approx([1.0, 1.0, -2.0], abs=1e-6)


def test_leave_one_out_is_the_centred_reward_times_n_over_n_less_1() -> None:
    rewards = torch.rand(14, 2, generator=torch.Generator().manual_seed(0))
    group = [0] * 8 + [1] * 4 + [2] * 2
    found = advantages("leave_one_out", rewards, group, (1.0, -0.5))
    centred = advantages("group_norm", rewards, group, (1.0, -0.5), std="none", clip=0.0)
    factors = [8 / 7] * 8 + [4 / 3] * 4 + [2.0] * 2
    expected = [a * factor for a, factor in zip(centred, factors, strict=True)]
    assert found == pytest.approx(expected, rel=1e-6)


def test_leave_one_out_counts_valid_rows_only_and_gives_0_to_one_alone() -> None:
    rows, valid = [[NAN], [1.0], [4.0], [2.0], [INF], [9.0]], [False, True, True, True, False, True]
    found = advantages("leave_one_out", rows, [0, 0, 0, 0, 1, 1], valid=valid)
    # Of 1, 4, 2 the others' means are 3, 1.5, 2.5; 9 is alone.
    assert found == pytest.approx([0.0, -2.0, 2.5, -0.5, 0.0, 0.0], abs=1e-6)
    assert found[5] == 0.0


# --- GDPO -------------------------------------------------------------------------------------


def test_gdpo_by_hand() -> None:
    """Two groups of two. Reward 1 is +-1 in both groups once normalised, though it is 1,000 times
    larger; reward 2 is +-1 in the first and equal in the second. With weights 2 and 1 the sums are
    (-2 - 1, 2 + 1) and (2, -2), of mean 0 and std sqrt((9 + 9 + 4 + 4) / 4)."""
    rows = [[0.0, 0.1], [1000.0, 0.2], [3.0, 0.7], [1.0, 0.7]]
    found = advantages("gdpo", rows, [0, 0, 1, 1], (2.0, 1.0), floor=0.0)
    std = math.sqrt(26 / 4)
    assert found == pytest.approx([x / std for x in (-3.0, 3.0, 2.0, -2.0)], abs=1e-6)
    assert advantages("gdpo", rows, [0, 0, 1, 1], (2.0, 1.0), floor=0.0, clip=1.0) == (
        pytest.approx([-1.0, 1.0, 2 / std, -2 / std], abs=1e-6)
    )
    opposed = advantages("gdpo", rows, [0, 0, 1, 1], (2.0, -1.0), floor=0.0)
    std = math.sqrt((1 + 1 + 4 + 4) / 4)
    assert opposed == pytest.approx([-1 / std, 1 / std, 2 / std, -2 / std], abs=1e-6)


def test_gdpo_keeps_apart_what_a_sum_of_rewards_does_not() -> None:
    """Rewards (0, 2), (1, 1), (2, 0), (0, 0): the first three add up to the same."""
    rows = [[0.0, 2.0], [1.0, 1.0], [2.0, 0.0], [0.0, 0.0]]
    summed = advantages("group_norm", rows, [0] * 4, (1.0, 1.0))
    assert len(set(summed)) == 2
    apart = advantages("gdpo", [[*row[:1], 3 * row[1] ** 2] for row in rows], [0] * 4, (1.0, 1.0))
    assert len({round(a, 6) for a in apart}) == 4


def test_the_floor_of_gdpo_is_added_to_every_std() -> None:
    # +-1 / (1 + 1) in the group, then +-.5 / (.5 + 1)
    assert advantages("gdpo", [[0.0], [2.0]], [0, 0], floor=1.0) == pytest.approx([-1 / 3, 1 / 3])


@pytest.mark.parametrize("equal", [False, True])
def test_gdpo_of_one_reward_is_the_group_s_then_the_batch_s_normalisation(equal: bool) -> None:
    rewards = torch.rand(12, 1, generator=torch.Generator().manual_seed(1))
    if equal:
        rewards[:4] = 0.1
    group = [0] * 4 + [1] * 6 + [2] * 2
    found = advantages("gdpo", rewards, group, floor=0.0)
    first = advantages("group_norm", rewards, group, floor=0.0, clip=0.0)
    rows = [[a] for a in first]
    both = advantages("group_norm", rows, [0] * 12, floor=0.0, clip=0.0)
    assert found == pytest.approx(both, abs=1e-6)
    if equal:  # the others' std is 1, that of all is sqrt(8 / 12)
        assert found[:4] == [0.0] * 4
        assert found == pytest.approx([a * math.sqrt(12 / 8) for a in first], abs=1e-6)
    else:
        assert found == pytest.approx(first, abs=1e-6)


def test_gdpo_does_not_see_the_scale_of_a_reward_or_invalid_rows() -> None:
    generator = torch.Generator().manual_seed(2)
    rewards, group = torch.rand(8, 2, generator=generator), [0, 1] * 4
    found = advantages("gdpo", rewards, group, (1.0, 0.3), floor=0.0)
    scaled = rewards * torch.tensor([2.0**-10, 64.0])
    again = advantages("gdpo", scaled, group, (1.0, 0.3), floor=0.0)
    assert again == pytest.approx(found, abs=1e-6)
    odd = torch.cat([rewards, torch.tensor([[NAN, INF], [-INF, 3.0]])])
    mixed = advantages("gdpo", odd, [*group, 0, 2], (1.0, 0.3), [True] * 8 + [False] * 2, floor=0.0)
    assert mixed == pytest.approx([*found, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("name", ["leave_one_out", "gdpo"])
def test_equal_rewards_give_exactly_zero(name: str) -> None:
    rows = [[0.1, 0.7]] * 7 + [[0.0, 0.3], [1.0, 0.9]]
    found = advantages(name, rows, [0] * 7 + [1] * 2, (0.3, 0.9))
    assert found[:7] == [0.0] * 7
    assert found[8] == -found[7] > 0
    assert advantages(name, rows[:7], [0] * 7, (0.3, 0.9)) == [0.0] * 7


# --- percentiles ------------------------------------------------------------------------------


def test_percentiles_by_hand() -> None:
    """Of 0, 1, 2, 3, 104 the 25th and 75th percentiles are 1 and 3, the 10th and 90th .4 and 63.6;
    the other group, of (8, 4), goes to (7, 5) by its own."""
    rows, group = [[0.0], [8.0], [1.0], [2.0], [3.0], [104.0], [4.0]], [0, 1, 0, 0, 0, 0, 1]
    found = advantages("group_norm", rows, group, percentiles=(25.0, 75.0), std="none")
    assert found == pytest.approx([-1.0, 1.0, -1.0, 0.0, 1.0, 1.0, -1.0], abs=1e-6)
    # std of 1, 1, 2, 3, 3: sqrt(4 / 5)
    found = advantages("group_norm", rows, group, percentiles=(25.0, 75.0), floor=0.0)
    one = 1 / math.sqrt(0.8)
    assert found == pytest.approx([-one, 1.0, -one, 0.0, one, one, -1.0], abs=1e-6)
    # .4, 1, 2, 3, 63.6 have mean 14
    found = advantages("group_norm", rows, group, percentiles=(10.0, 90.0), std="none", clip=0.0)
    assert found[:1] + found[2:6] == pytest.approx([-13.6, -13.0, -12.0, -11.0, 49.6], abs=1e-5)


def test_percentiles_are_of_valid_rows() -> None:
    rows, group = [[0.0], [NAN], [1.0], [2.0], [3.0], [-INF], [104.0]], [0] * 7
    valid = [True, False, True, True, True, False, True]
    options = {"percentiles": (25.0, 75.0), "std": "none"}
    found = advantages("group_norm", rows, group, valid=valid, **options)
    assert found == pytest.approx([-1.0, 0.0, -1.0, 0.0, 1.0, 0.0, 1.0], abs=1e-6)


def test_all_percentiles_change_nothing() -> None:
    rewards = torch.rand(9, 1, generator=torch.Generator().manual_seed(3))
    plain = advantages("group_norm", rewards, [0, 1, 2] * 3)
    assert advantages("group_norm", rewards, [0, 1, 2] * 3, percentiles=(0.0, 100.0)) == plain


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("leave_one_out", {"clip": -1.0}, "clip"),
        ("leave_one_out", {"std": "group"}, "std"),
        ("gdpo", {"floor": -1e-6}, "floor"),
        ("gdpo", {"clip": -5.0}, "clip"),
        ("group_norm", {"percentiles": (90.0, 10.0)}, "90, 10.*the first must be the lower one"),
        ("group_norm", {"percentiles": (5.0, 5.0)}, "must be the lower one"),
        ("group_norm", {"percentiles": (-1.0, 99.0)}, "percentiles"),
        ("group_norm", {"percentiles": (1.0, 101.0)}, "percentiles"),
        ("group_norm", {"percentiles": (5.0,)}, "percentiles"),
    ],
)
def test_wrong_options(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        METHODS[name].options.model_validate(given)
