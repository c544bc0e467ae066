"""Dr. GRPO, DAPO, GSPO and CISPO: values by hand, gradients, and where each of them is GRPO."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from unigrpo_methods.objectives import cispo, dapo, dr_grpo, grpo, gspo

from unigrpo_core.errors import UserError
from unigrpo_core.interfaces import TextObjective
from unigrpo_core.plugin import Provider

PROVIDERS = {one.PROVIDER.name: one.PROVIDER for one in (cispo, dapo, dr_grpo, grpo, gspo)}


def objective(name: str, **options: Any) -> TextObjective:
    provider: Provider = PROVIDERS[name]
    return provider.build(provider.options.model_validate(options))


def drawn(lengths: tuple[int, ...], spread: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logps, old_logps, mask and advantages of both signs, float64; log-ratios of that spread."""
    generator = torch.Generator().manual_seed(3)
    shape = (len(lengths), max(lengths))
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    old = -0.1 - 2 * torch.rand(shape, generator=generator, dtype=torch.float64)
    gap = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    advantages[:2] = torch.tensor([1.5, -0.7])
    return (old + gap).masked_fill(~mask, 0), old.masked_fill(~mask, 0), mask, advantages


def update(one: TextObjective, given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The loss of the update, and its gradient by the log-probs."""
    logps, old, mask, advantages = given
    logps = logps.clone().requires_grad_()
    values, _ = one.loss(logps, old, mask, advantages)
    loss = (values * one.weights(mask)).sum() / one.total(mask)
    return loss.detach(), torch.autograd.grad(loss, logps)[0]


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


# --- by hand ----------------------------------------------------------------------------------

RATIOS = ((1.1, 1.5, 0.5), (1.5, 0.5, 9.0))  # the last one is padding
MASK = torch.tensor([[True] * 3, [True, True, False]])


def of_ratios(advantages: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ratios = torch.tensor(RATIOS, dtype=torch.float64)
    old = torch.full_like(ratios, -3.0)
    return old + ratios.log(), old, MASK, torch.tensor(advantages).double()


# name, options -> values and where the clip acts at A = (2, -1), then at A = (-2, 1), ratios above
HAND: list[tuple[str, dict[str, float], Any, Any, Any, Any]] = [
    (
        "dapo",
        {"clip_low": 0.2, "clip_high": 0.28},
        [[-2.2, -2.56, -1.0], [1.5, 0.8, 0.0]],
        [[0, 1, 0], [0, 1, 0]],
        [[2.2, 3.0, 1.6], [-1.28, -0.5, 0.0]],
        [[0, 0, 1], [1, 0, 0]],
    ),
    (
        "dapo",
        {"clip_low": 0.6, "clip_high": 0.05},
        [[-2.1, -2.1, -1.0], [1.5, 0.5, 0.0]],
        [[1, 1, 0], [0, 0, 0]],
        [[2.2, 3.0, 1.0], [-1.05, -0.5, 0.0]],
        [[0, 0, 0], [1, 0, 0]],
    ),
    (
        "dr_grpo",
        {"max_tokens": 4, "clip_range": 0.2},
        [[-2.2, -2.4, -1.0], [1.5, 0.8, 0.0]],
        [[0, 1, 0], [0, 1, 0]],
        [[2.2, 3.0, 1.6], [-1.2, -0.5, 0.0]],
        [[0, 0, 1], [1, 0, 0]],
    ),
]


@pytest.mark.parametrize("case", HAND, ids=lambda case: case[0])
def test_token_values_by_hand(case: tuple[Any, ...]) -> None:
    name, options, *expected = case
    one = objective(name, **options)
    for advantages, values, acted in (
        ((2.0, -1.0), *expected[:2]),
        ((-2.0, 1.0), *expected[2:]),
    ):
        found, metrics = one.loss(*of_ratios(advantages))
        torch.testing.assert_close(found, torch.tensor(values).double(), atol=1e-6, rtol=0)
        assert metrics["clip_fraction"].tolist() == acted
        deviation = [[0.1, 0.5, 0.5], [0.5, 0.5, 0.0]]
        torch.testing.assert_close(metrics["ratio_deviation"], torch.tensor(deviation).double())


def test_the_gradient_of_a_wider_clip_stops_where_the_clip_acts() -> None:
    logps, old, mask, advantages = of_ratios((2.0, -1.0))
    values, _ = objective("dapo").loss(logps.requires_grad_(), old, mask, advantages)
    (gradient,) = torch.autograd.grad(values.sum(), logps)
    # -r A; 0 at 1.5 > 1.28 with A > 0, and at .5 < .8 with A < 0
    expected = torch.tensor([[-2.2, 0.0, -1.0], [1.5, 0.0, 0.0]]).double()
    torch.testing.assert_close(gradient, expected)


def test_sums_and_totals_by_hand() -> None:
    given = of_ratios((2.0, -1.0))
    # DAPO: (-2.2 - 2.56 - 1 + 1.5 + .8) / 5 tokens
    assert update(objective("dapo"), given)[0].item() == pytest.approx(-3.46 / 5)
    # Dr. GRPO: (-2.2 - 2.4 - 1 + 1.5 + .8) / (2 rows of 7)
    one = objective("dr_grpo", max_tokens=7)
    assert update(one, given)[0].item() == pytest.approx(-3.3 / 14)
    assert one.total(MASK).item() == 14
    assert one.total(MASK).dtype == torch.float32


@pytest.mark.parametrize(
    ("gaps", "advantage", "value", "acted", "slope"),
    [
        # The mean of the first two is .1, so s = e^.1 = 1.105171; of the others +-.3.
        ((0.3, -0.1), 2.0, -2 * 1.1051709, 0, -2 * 1.1051709),
        ((0.3, -0.1), -2.0, 2 * 1.1051709, 0, 2 * 1.1051709),
        ((0.9, -0.3), 2.0, -2 * 1.25, 1, 0.0),
        ((0.9, -0.3), -2.0, 2 * 1.3498588, 0, 2 * 1.3498588),
        ((-0.9, 0.3), 2.0, -2 * 0.7408182, 0, -2 * 0.7408182),
        ((-0.9, 0.3), -2.0, 2 * 0.85, 1, 0.0),
    ],
)
def test_gspo_by_hand(
    gaps: tuple[float, float], advantage: float, value: float, acted: int, slope: float
) -> None:
    old = torch.tensor([[-1.0, -2.0, -9.0]], dtype=torch.float64)
    logps = old + torch.tensor([[*gaps, 5.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    one = objective("gspo", clip_low=0.15, clip_high=0.25)
    given = (logps, old, mask, torch.tensor([advantage]).double())
    values, metrics = one.loss(*given)
    assert values.tolist() == [[pytest.approx(value, rel=1e-6)] * 2 + [0.0]]
    assert metrics["clip_fraction"].tolist() == [[acted, acted, 0]]
    deviation = abs(math.exp(sum(gaps) / 2) - 1)
    assert metrics["ratio_deviation"].tolist() == [[pytest.approx(deviation)] * 2 + [0.0]]
    loss, gradient = update(one, given)
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert gradient.tolist() == [[pytest.approx(slope / 2, rel=1e-6)] * 2 + [0.0]]


def test_gspo_averages_sequences_whatever_their_lengths() -> None:
    given = drawn((1, 5, 3), 1e-3)
    logps, old, _, advantages = given
    means = [(logps - old)[row, :n].mean() for row, n in enumerate((1, 5, 3))]
    bounded = [m.exp().clamp(1 - 3e-4, 1 + 4e-4) for m in means]
    pairs = zip(means, bounded, advantages, strict=True)
    gains = [torch.minimum(m.exp() * a, b * a) for m, b, a in pairs]
    assert update(objective("gspo"), given)[0].item() == pytest.approx(-sum(gains).item() / 3)


def test_cispo_by_hand() -> None:
    """Weights 1.1, 1.4 (held), .5 at A = 2, then 1.4 (held), .5 at A = -1; log-probs -3 + log r."""
    logps, old, mask, advantages = of_ratios((2.0, -1.0))
    one = objective("cispo", clip_high=0.4)
    values, metrics = one.loss(logps.requires_grad_(), old, mask, advantages)
    logs = [math.log(r) - 3 for r in (1.1, 1.5, 0.5)]
    expected = [
        [-1.1 * 2 * logs[0], -1.4 * 2 * logs[1], -0.5 * 2 * logs[2]],
        [1.4 * logs[1], 0.5 * logs[2], 0.0],
    ]
    torch.testing.assert_close(values.detach(), torch.tensor(expected).double(), atol=1e-6, rtol=0)
    assert metrics["clip_fraction"].tolist() == [[0, 1, 0], [1, 0, 0]]
    assert metrics["ratio_deviation"][0].tolist() == pytest.approx([0.1, 0.5, 0.5])
    assert not any(metric.requires_grad for metric in metrics.values())
    (gradient,) = torch.autograd.grad(values.sum(), logps)
    torch.testing.assert_close(
        gradient, torch.tensor([[-2.2, -2.8, -1.0], [1.4, 0.5, 0.0]]).double(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("name", ["dr_grpo", "dapo", "gspo", "cispo"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_ratios_and_padding_garbage_leave_finite_gradients(name: str, sign: float) -> None:
    logps = torch.tensor([[0.0, float("inf"), float("nan")], [-200.0, 0.0, 0.0]])
    old = torch.tensor([[-200.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, False, False], [True, False, False]])
    one = objective(name, **({"max_tokens": 3} if name == "dr_grpo" else {}))
    values, metrics = one.loss(logps.requires_grad_(), old, mask, torch.tensor([sign, -sign]))
    (gradient,) = torch.autograd.grad(values.sum(), logps)
    for found in (values, gradient, *metrics.values()):
        assert found.isfinite().all()
        assert not found[~mask].any()


# --- limits -----------------------------------------------------------------------------------


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


# --- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("name", "options", "spread"),
    [
        ("dr_grpo", {"max_tokens": 6}, 0.3),
        ("dapo", {}, 0.3),
        ("gspo", {"clip_low": 0.01, "clip_high": 0.02}, 0.1),
    ],
)
def test_gradients(name: str, options: dict[str, float], spread: float, sign: float) -> None:
    logps, old, mask, advantages = drawn((6, 1, 4, 5, 3, 2, 6), spread)
    one = objective(name, **options)

    def loss(current: Tensor) -> Tensor:
        return one.loss(current, old, mask, sign * advantages)[0]

    _, metrics = one.loss(logps, old, mask, sign * advantages)
    assert 0 < metrics["clip_fraction"][mask].mean() < 1
    assert torch.autograd.gradcheck(loss, (logps.requires_grad_(),))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradients_of_cispo_are_those_with_its_weights_held(sign: float) -> None:
    logps, old, mask, advantages = drawn((6, 1, 4), 0.5)
    held = (logps - old).exp().clamp(max=1.3)
    assert 0 < (held == 1.3)[mask].double().mean() < 1

    def linear(current: Tensor) -> Tensor:
        return -held * sign * advantages[:, None] * current * mask

    point = logps.clone().requires_grad_()
    assert torch.autograd.gradcheck(linear, (point,))
    values, _ = objective("cispo", clip_high=0.3).loss(point, old, mask, sign * advantages)
    torch.testing.assert_close(values, linear(point))
    (gradient,) = torch.autograd.grad(values.sum(), point)
    torch.testing.assert_close(gradient, torch.autograd.grad(linear(point).sum(), point)[0])


# --- mistakes ---------------------------------------------------------------------------------


def test_dr_grpo_refuses_a_sequence_that_is_longer_than_its_constant() -> None:
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    assert objective("dr_grpo", max_tokens=5).total(mask) == 10
    with pytest.raises(UserError, match=r"max_tokens = 4 .* one of 5 .* to text.max_tokens"):
        objective("dr_grpo", max_tokens=4).total(mask)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("dr_grpo", {}),
        ("dr_grpo", {"max_tokens": 0}),
        ("dr_grpo", {"max_tokens": 4, "clip_range": 0.0}),
        ("dapo", {"clip_low": 0.0}),
        ("dapo", {"clip_high": -0.28}),
        ("dapo", {"clip_range": 0.2}),
        ("gspo", {"clip_low": -3e-4}),
        ("gspo", {"clip_high": 0.0}),
        ("cispo", {"clip_high": 0.0}),
        ("cispo", {"clip_low": 0.2}),
    ],
)
def test_wrong_options(name: str, given: dict[str, float]) -> None:
    key = list(given)[-1] if given else "max_tokens"
    with pytest.raises(ValidationError, match=key):
        PROVIDERS[name].options.model_validate(given)
