"""ReFL: values and gradients of known scores, with and without a ceiling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from unigrpo_methods.objectives import refl
from unigrpo_methods.schedulers import flow_sde, ode

from unigrpo_core.records import ImageSegment, Points

ODE = ode.build(ode.ODEOptions())
SDE = flow_sde.build(flow_sde.FlowSDEOptions())


def build(**options) -> refl.ReFL:
    return refl.build(refl.ReFLOptions.model_validate(options))


def stored(score: Callable[[Tensor], Tensor], noise_level: float = 0.0) -> tuple[Points, Tensor]:
    """The last two steps of four of two images, sampled by v = x_t / 2, and those velocities."""
    scheduler = SDE if noise_level else ODE
    generator = torch.Generator().manual_seed(4)
    x_t = torch.randn(2, 2, 3, 2, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.5, 0.25], dtype=torch.float64).expand(2, 2)
    level = torch.full((2, 2), noise_level, dtype=torch.float64)
    step = scheduler.transition(x_t / 2, x_t, t, t - 0.25, level)
    segment = ImageSegment(
        x_t=x_t,
        x_next=step.mean,
        old_mean=step.mean,
        t=t,
        t_next=t - 0.25,
        noise_level=level,
        latents=step.mean[:, -1],
        images=step.mean,
    )
    points = build().points(segment, scheduler, ())
    return replace(points, score=score), x_t / 2


def linear(latents: Tensor) -> Tensor:
    """2 times the sum of the first column, less that of the second."""
    return (latents * torch.tensor([2.0, -1.0]).double()).flatten(2).sum(2)


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_a_linear_score_has_its_gradient(noise_level: float) -> None:
    """By v of -S(x_t - t v): t times the score's."""
    points, v = stored(linear, noise_level)
    v.requires_grad_()
    nothing = torch.full_like(points.t, math.nan)  # advantages and rewards are not read
    values, metrics = build(weight=3.0).loss(points, {"current": v}, nothing, nothing)
    data = points.x_t * (1 - points.t[..., None, None] / 2)
    score = 2 * data[..., 0].sum(2) - data[..., 1].sum(2)
    torch.testing.assert_close(values, -3 * score)
    torch.testing.assert_close(metrics["score"], score)
    assert not metrics["score"].requires_grad
    (gradient,) = torch.autograd.grad(values.sum(), v)
    slope = torch.tensor([2.0, -1.0]).double().expand(3, 2)
    torch.testing.assert_close(gradient, 3 * points.t[..., None, None] * slope)


def test_above_the_ceiling_there_is_no_gradient() -> None:
    """As with the original's relu(2 - S), but for the constant."""
    points, v = stored(linear)
    v.requires_grad_()
    values, metrics = build(ceiling=0.5).loss(points, {"current": v}, points.t, points.t)
    above = metrics["score"] > 0.5
    assert above.any()
    assert not above.all()
    original = torch.relu(0.5 - metrics["score"])
    torch.testing.assert_close(values + 0.5, original)
    (gradient,) = torch.autograd.grad(values.sum(), v)
    assert torch.equal(gradient.flatten(2).any(2), ~above)


@pytest.mark.parametrize("ceiling", [None, 0.3])
def test_gradients(ceiling: float | None) -> None:
    points, v = stored(lambda latents: latents.sin().flatten(2).mean(2))
    objective = build(ceiling=ceiling)

    def loss(current: Tensor) -> Tensor:
        return objective.loss(points, {"current": current}, points.t, points.t)[0]

    assert torch.autograd.gradcheck(loss, (v.requires_grad_(),))


def test_a_log_ratio_is_the_shift_of_the_mean() -> None:
    points, v = stored(linear)
    assert not build().log_ratio(points, v).any()
    torch.testing.assert_close(
        build().log_ratio(points, v + 0.2), torch.full((2, 2), -0.05).double()
    )


def test_the_bounds() -> None:
    points, _ = stored(linear)
    assert build().clip_range(9) == math.inf
    assert build().trust_radius(points).tolist() == [[math.inf] * 2] * 2
    assert build().needs == {"score"}
    assert not build().fresh
    weights = build().weights(torch.tensor([[True, False]]))
    assert weights.dtype == torch.float32
    assert weights.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("given", [{"weight": 0.0}, {"ceiling": "2"}, {"clip_range": 1e-4}])
def test_wrong_options(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(given))):
        build(**given)
