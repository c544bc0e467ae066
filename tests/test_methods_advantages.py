"""Group-relative advantages by hand."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from unigrpo_methods.advantages import group_norm


def advantages(
    rewards: list[list[float]],
    group: list[int],
    weights: tuple[float, ...] = (1.0,),
    valid: list[bool] | None = None,
    **options: object,
) -> list[float]:
    advantage = group_norm.build(group_norm.GroupNormOptions.model_validate(options))
    result = advantage(
        torch.tensor(rewards),
        torch.tensor(weights),
        torch.tensor(group),
        torch.tensor([True] * len(group) if valid is None else valid),
    )
    assert result.dtype == torch.float32
    return result.tolist()


ROWS, GROUPS = [[1.0], [10.0], [3.0], [10.0], [5.0], [16.0]], [7, 2, 7, 2, 7, 2]


def test_the_group_std_is_the_population_s() -> None:
    # Group 7: mean 3, std sqrt(8/3). Group 2: mean 12, std sqrt(8).
    one, two = 2 / math.sqrt(8 / 3), 2 / math.sqrt(8)
    expected = [-one, -two, 0.0, -two, one, 2 * two]
    assert advantages(ROWS, GROUPS, floor=0.0) == pytest.approx(expected, rel=1e-6)


def test_the_floor_is_added_to_the_std() -> None:
    assert advantages([[0.0], [2.0]], [0, 0], floor=1.0) == [-0.5, 0.5]


def test_the_global_std_is_that_of_all_rows() -> None:
    # All rows: mean 7.5, squared deviations 42.25, 6.25, 20.25, 6.25, 6.25, 72.25, so sum 153.5.
    std = math.sqrt(153.5 / 6)
    expected = [gap / std for gap in (-2, -2, 0, -2, 2, 4)]
    assert advantages(ROWS, GROUPS, std="global", floor=0.0) == pytest.approx(expected, rel=1e-6)


def test_none_only_centres() -> None:
    assert advantages(ROWS, GROUPS, std="none") == [-2.0, -2.0, 0.0, -2.0, 2.0, 4.0]


@pytest.mark.parametrize("std", ["group", "global", "none"])
@pytest.mark.parametrize("floor", [0.0, 1e-6])
def test_equal_rewards_give_exactly_zero(std: str, floor: float) -> None:
    equal = [[0.1, 0.7]] * 7
    assert advantages(equal, [0] * 7, (0.3, 0.9), std=std, floor=floor) == [0.0] * 7
    beside = advantages([*equal, [0.0, 0.0], [1.0, 1.0]], [0] * 7 + [1] * 2, (0.3, 0.9), std=std)
    assert beside[:7] == [0.0] * 7
    assert beside[8] == -beside[7] > 0


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_invalid_rows_count_for_nothing(std: str) -> None:
    clean = advantages([[1.0], [4.0], [2.0], [3.0]], [0, 0, 1, 1], std=std)
    nan, inf = float("nan"), float("inf")
    mixed = advantages(
        [[nan], [1.0], [4.0], [2.0], [-inf], [3.0], [nan]],
        [0, 0, 0, 1, 1, 1, 2],
        valid=[False, True, True, True, False, True, False],
        std=std,
    )
    assert mixed == [0.0, clean[0], clean[1], clean[2], 0.0, clean[3], 0.0]


def test_a_group_of_one_gets_zero() -> None:
    assert advantages([[0.3], [0.2], [0.4]], [0, 1, 1], std="group")[0] == 0.0


def test_rewards_are_combined_before_they_are_normalised() -> None:
    two = advantages([[1.0, 0.0], [0.0, 4.0], [0.0, 0.0]], [0, 0, 0], (2.0, 0.5), std="none")
    assert two == pytest.approx([2 - 4 / 3, 2 - 4 / 3, -4 / 3])


def test_a_negative_weight_turns_a_reward_around() -> None:
    assert advantages([[1.0], [3.0]], [0, 0], (-1.0,), floor=0.0) == [1.0, -1.0]


def test_the_clip() -> None:
    rows, groups = [[0.0]] * 35 + [[1.0]], [0] * 36  # the last row is sqrt(35) stds above
    assert advantages(rows, groups, clip=0.0, floor=0.0)[-1] == pytest.approx(math.sqrt(35))
    assert advantages(rows, groups)[-1] == 5.0
    assert advantages([[0.0], [4.0]], [0, 0], std="none", clip=1.5) == [-1.5, 1.5]


@pytest.mark.parametrize(
    "given", [{"std": "batch"}, {"floor": -1e-6}, {"clip": -1.0}, {"epsilon": 1e-4}]
)
def test_wrong_options(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(given))):
        group_norm.GroupNormOptions.model_validate(given)
