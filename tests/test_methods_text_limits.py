"""Where each text objective is GRPO, or has its gradient."""

from __future__ import annotations

import pytest
import torch
from text_objectives import drawn, objective, update
from torch import Tensor

from unigrpo_core.interfaces import TextObjective


def same(one: TextObjective, other: TextObjective, given: tuple[Tensor, ...]) -> None:
    """Same loss, gradient, values and metrics, the weights' rounding to float32 aside."""
    for mine, theirs in zip(update(one, given), update(other, given), strict=True):
        assert theirs.any()
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-6)
    (values, metrics), (expected, figures) = one.loss(*given), other.loss(*given)
    torch.testing.assert_close(values, expected, atol=1e-12, rtol=1e-12)
    assert metrics.keys() == figures.keys()
    for name, metric in metrics.items():
        torch.testing.assert_close(metric, figures[name], atol=1e-12, rtol=1e-12)
    assert 0 < figures["clip_fraction"].mean() < 1


def test_dr_grpo_with_all_lengths_at_the_most_is_grpo() -> None:
    given = drawn((6, 6, 6, 6), 0.3)
    same(
        objective("dr_grpo", max_tokens=6, clip_range=0.3), objective("grpo", clip_range=0.3), given
    )
    half = update(objective("dr_grpo", max_tokens=12, clip_range=0.3), given)
    whole = update(objective("grpo", clip_range=0.3), given)
    torch.testing.assert_close(2 * half[1], whole[1], atol=1e-9, rtol=1e-6)


def test_dr_grpo_does_not_divide_a_sequence_by_its_length() -> None:
    """At ratio 1 every token has the same gradient per advantage, in a short row or a long one."""
    logps, _, mask, _ = drawn((2, 6), 0.0)
    _, gradient = update(
        objective("dr_grpo", max_tokens=6), (logps, logps, mask, torch.ones(2).double())
    )
    assert gradient[mask].tolist() == pytest.approx([-1 / 12] * 8)


def test_dapo_with_equal_clips_and_equal_lengths_is_grpo() -> None:
    equal = objective("dapo", clip_low=0.2, clip_high=0.2)
    same(equal, objective("grpo"), drawn((6, 6, 6, 6), 0.3))


def test_dapo_with_unequal_lengths_is_a_mean_over_tokens() -> None:
    given = drawn((1, 6, 3), 0.3)
    equal = objective("dapo", clip_low=0.2, clip_high=0.2)
    values, _ = objective("grpo").loss(*given)
    loss, _ = update(equal, given)
    assert loss.item() == pytest.approx(values.sum().item() / 10)
    assert loss.item() != pytest.approx(update(objective("grpo"), given)[0].item())


def test_gspo_at_length_1_is_grpo() -> None:
    equal = objective("gspo", clip_low=0.2, clip_high=0.2)
    same(equal, objective("grpo"), drawn((1,) * 12, 0.3))


def test_gspo_at_the_old_policy_has_grpo_s_gradient() -> None:
    logps, _, mask, advantages = drawn((1, 6, 3), 0.0)
    given = (logps, logps, mask, advantages)
    torch.testing.assert_close(update(objective("gspo"), given), update(objective("grpo"), given))


@pytest.mark.parametrize("lengths", [(6, 6, 6), (1, 6, 3)])
def test_cispo_at_ratio_1_has_the_gradient_of_a_token_mean_of_grpo(
    lengths: tuple[int, ...],
) -> None:
    logps, _, mask, advantages = drawn(lengths, 0.0)
    given = (logps, logps, mask, advantages)
    _, gradient = update(objective("cispo"), given)
    torch.testing.assert_close(gradient, update(objective("dapo"), given)[1])
    if len(set(lengths)) == 1:
        torch.testing.assert_close(gradient, update(objective("grpo"), given)[1])


def test_cispo_inside_its_bound_has_the_unclipped_surrogate_s_gradient() -> None:
    given = drawn((6, 4, 6), 0.3)
    free = objective("dapo", clip_low=30.0, clip_high=30.0)
    torch.testing.assert_close(update(objective("cispo"), given)[1], update(free, given)[1])
