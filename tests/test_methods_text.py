"""Dr. GRPO, DAPO, GSPO and CISPO: values by hand, gradients, mistakes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from text_objectives import PROVIDERS, drawn, objective, update
from torch import Tensor

from unigrpo_core.errors import UserError

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
