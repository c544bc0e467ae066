"""GRPO and FlowGRPO: values by hand, both signs, clipped or not; gradients; exact zeros."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from unigrpo_methods.objectives import flow_grpo, grpo
from unigrpo_methods.objectives.surrogate import clipped_surrogate
from unigrpo_methods.schedulers import flow_sde

from unigrpo_core.records import ImageSegment, Points

SDE = flow_sde.build(flow_sde.FlowSDEOptions())

# (ratio, advantage) -> (loss, does the clip act, loss derivative by the ratio), clip range 0.2
BY_HAND = [
    (1.0, 2.0, -2.0, 0.0, -2.0),
    (1.1, 2.0, -2.2, 0.0, -2.0),
    (1.5, 2.0, -2.4, 1.0, 0.0),
    (0.5, 2.0, -1.0, 0.0, -2.0),
    (1.1, -2.0, 2.2, 0.0, 2.0),
    (1.5, -2.0, 3.0, 0.0, 2.0),
    (0.9, -2.0, 1.8, 0.0, 2.0),
    (0.5, -2.0, 1.6, 1.0, 0.0),
    (1.5, 0.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "acted", "slope"), BY_HAND)
def test_grpo_by_hand(
    ratio: float, advantage: float, loss: float, acted: float, slope: float
) -> None:
    logps = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    old = logps.detach() - math.log(ratio)
    values, metrics = grpo.build(grpo.GRPOOptions(clip_range=0.2)).loss(
        logps, old, torch.tensor([[True, False]]), torch.tensor([advantage]).double()
    )
    assert values.tolist() == [[pytest.approx(loss), 0.0]]
    assert metrics["clip_fraction"].tolist() == [[acted, 0.0]]
    assert metrics["ratio_deviation"].tolist() == [[pytest.approx(abs(ratio - 1)), 0.0]]
    assert not any(metric.requires_grad for metric in metrics.values())
    (gradient,) = torch.autograd.grad(values.sum(), logps)
    assert gradient.tolist() == [[pytest.approx(slope * ratio), 0.0]]


def test_grpo_of_two_thoughts_by_hand() -> None:
    """Ratios 1.1, 1.5, .5, 1 at A = 2: -2.2, -2.4, -1, -2, so -1.9 on average. Ratios 1.5, .5 at
    A = -1: 1.5, .8, so 1.15. Their mean is -.375, whatever their lengths."""
    ratios = torch.tensor([[1.1, 1.5, 0.5, 1.0], [1.5, 0.5, 9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    objective = grpo.build(grpo.GRPOOptions(clip_range=0.2))
    old = torch.full_like(ratios, -1.0)
    values, metrics = objective.loss(
        old + ratios.log(), old, mask, torch.tensor([2.0, -1.0]).double()
    )
    weights = objective.weights(mask)
    expected = torch.tensor([[-2.2, -2.4, -1.0, -2.0], [1.5, 0.8, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(values, expected)
    assert metrics["clip_fraction"].tolist() == [[0, 1, 0, 0], [0, 1, 0, 0]]
    assert ((values * weights).sum() / weights.sum()).item() == pytest.approx(-0.375)


def test_grpo_weights_average_tokens_then_sequences() -> None:
    mask = torch.tensor([[True, True, True, True], [True, False, False, False], [False] * 4])
    weights = grpo.build(grpo.GRPOOptions()).weights(mask)
    assert weights.dtype == torch.float32
    assert weights.tolist() == [[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.0] * 4]


def test_grpo_survives_padding_garbage_and_huge_ratios() -> None:
    logps = torch.tensor([[0.0, float("inf"), float("nan")]], requires_grad=True)
    values, _ = grpo.build(grpo.GRPOOptions()).loss(
        logps,
        torch.tensor([[-200.0, 0.0, 0.0]]),
        torch.tensor([[True, False, False]]),
        torch.ones(1),
    )
    assert values.tolist() == [[pytest.approx(-1.2), 0.0, 0.0]]
    (gradient,) = torch.autograd.grad(values.sum(), logps)
    assert gradient.isfinite().all()


def test_grpo_is_minus_the_advantage_at_the_old_policy() -> None:
    logps = -torch.rand(2, 3)
    values, metrics = grpo.build(grpo.GRPOOptions()).loss(
        logps, logps, torch.ones(2, 3, dtype=torch.bool), torch.tensor([0.7, -1.3])
    )
    assert torch.equal(values, -torch.tensor([[0.7] * 3, [-1.3] * 3]))
    assert not metrics["ratio_deviation"].any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "acted"),
    [
        (1.15, 2.0, -2.2, 1.0),  # held at 1 + .1
        (1.15, -2.0, 2.3, 0.0),
        (0.75, 2.0, -1.5, 0.0),
        (0.75, -2.0, 1.5, 0.0),
        (0.65, -2.0, 1.4, 1.0),  # held at 1 - .3
    ],
)
def test_the_surrogate_has_two_bounds(
    ratio: float, advantage: float, loss: float, acted: float
) -> None:
    at, a = torch.tensor([ratio]).double().log(), torch.tensor([advantage]).double()
    values, metrics = clipped_surrogate(at, a, 0.3, 0.1)
    assert values.tolist() == pytest.approx([loss])
    assert metrics["clip_fraction"].tolist() == [acted]
    for one, other in zip(
        clipped_surrogate(at, a, 0.2), clipped_surrogate(at, a, 0.2, 0.2), strict=True
    ):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def stored_points(latents: tuple[int, ...], dtype: torch.dtype, drift: float = 0.0) -> Points:
    """Two images of three SDE steps sampled with velocities v = x_t / 2 - ``drift``."""
    generator = torch.Generator().manual_seed(5)

    def draw() -> Tensor:
        return torch.randn(2, 3, *latents, generator=generator, dtype=dtype)

    x_t, times = draw(), SDE.times(10, 3.0).to(dtype)
    t, t_next = times[:3].expand(2, 3), times[1:4].expand(2, 3)
    noise_level = torch.full((2, 3), 0.8, dtype=dtype)
    step = SDE.transition(x_t / 2 - drift, x_t, t, t_next, noise_level)
    segment = ImageSegment(
        x_t=x_t,
        x_next=step.mean + step.std * draw(),
        old_mean=step.mean,
        t=t,
        t_next=t_next,
        noise_level=noise_level,
        latents=x_t[:, 0],
        images=x_t,
    )
    return flow_grpo.build(flow_grpo.FlowGRPOOptions(clip_range=1e-4)).points(segment, SDE, ())


NORM = flow_grpo.build(flow_grpo.FlowGRPOOptions(ratio_norm=True))
PLAIN = flow_grpo.build(flow_grpo.FlowGRPOOptions(clip_range=0.2))


@pytest.mark.parametrize("objective", [NORM, PLAIN])
def test_flow_log_ratios_are_exactly_zero_at_the_old_policy(objective: flow_grpo.FlowGRPO) -> None:
    points = stored_points((4, 8, 8), torch.float32)
    advantages = torch.tensor([[1.5] * 3, [-0.5] * 3])
    values, metrics = objective.loss(points, {"current": points.x_t / 2}, advantages, advantages)
    assert not objective.log_ratio(points, points.x_t / 2).any()
    assert torch.equal(values, -advantages)
    assert not metrics["ratio_deviation"].any()
    assert not metrics["clip_fraction"].any()


def drifted_points() -> tuple[Points, Tensor, Tensor, Tensor, Tensor]:
    """Points, the velocity now, and written out: mu, mu_old, and std [2, 3] by sigma_t and dt."""
    points = stored_points((5, 7), torch.float64, drift=0.3)
    v = points.x_t / 2
    sigma = points.noise_level * (points.t / (1 - points.t)).sqrt()
    sigma[:, 0] = points.noise_level[:, 0] / (1 - points.t_next[:, 0]).sqrt()
    std = sigma * (points.t - points.t_next).sqrt()
    return points, v, points.transition(v).mean, points.transition(v - 0.3).mean, std


def equation_4(points: Points, new: Tensor, old: Tensor, std: Tensor) -> Tensor:
    wide = std[..., None, None].expand_as(new)
    log_r = torch.distributions.Normal(new, wide).log_prob(points.x_next)
    return (log_r - torch.distributions.Normal(old, wide).log_prob(points.x_next)).mean((2, 3))


def test_the_plain_log_ratio_is_equation_4() -> None:
    points, v, new, old, std = drifted_points()
    expected = equation_4(points, new, old, std)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(PLAIN.log_ratio(points, v), expected, atol=1e-10, rtol=1e-8)


def test_ratio_norm_is_equation_5_and_minus_delta_mu_times_eps_averaged() -> None:
    points, v, new, old, std = drifted_points()
    delta = old - new  # the paper's sign
    expected = std * (
        equation_4(points, new, old, std) + delta.square().mean((2, 3)) / (2 * std.square())
    )
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(NORM.log_ratio(points, v), expected, atol=1e-10, rtol=1e-8)
    eps = (points.x_next - old) / std[..., None, None]
    torch.testing.assert_close(NORM.log_ratio(points, v), -(delta * eps).mean((2, 3)))


def test_ratio_norm_of_262144_elements_is_exact_in_float32() -> None:
    points = stored_points((64, 64, 64), torch.float32)
    v = points.x_t / 2 + 1e-3 * stored_points((64, 64, 64), torch.float32).x_next
    ours = NORM.log_ratio(points, v)
    std = points.transition(v).std.double()
    delta = points.transition(v).mean.double() - points.old_mean.double()
    eps = (points.x_next.double() - points.old_mean.double()) / std
    assert ours.abs().max() > 1e-6
    assert (ours - (delta * eps).mean((2, 3, 4))).abs().max() < 1e-9


@pytest.mark.parametrize(("ratio", "advantage", "loss", "acted", "slope"), BY_HAND)
def test_flow_grpo_by_hand(
    ratio: float, advantage: float, loss: float, acted: float, slope: float
) -> None:
    # One latent element at t = .5 -> .25 without drift: std^2 = .64 * .25 = .16, and x_next is
    # chosen so that log r = (mu - old)(2 x_next - mu - old) / .32 is log(ratio) for mu - old = .1.
    half, quarter = torch.tensor([[0.5]]).double(), torch.tensor([[0.25]]).double()
    v = torch.tensor([[[0.4]]], dtype=torch.float64, requires_grad=True)
    x_t = torch.full((1, 1, 1), 0.9, dtype=torch.float64)
    noise = torch.full((1, 1), 0.8, dtype=torch.float64)
    mean = 0.9 + 0.4 * -0.25 + 0.64 * (0.9 + 0.5 * 0.4) * -0.25
    old_mean = torch.full((1, 1, 1), mean - 0.1, dtype=torch.float64)
    x_next = (2 * old_mean + 0.1 + 3.2 * math.log(ratio)) / 2
    points = Points(x_t, half, quarter, noise, x_next, old_mean, SDE.transition)
    values, metrics = PLAIN.loss(
        points, {"current": v}, torch.tensor([[advantage]]).double(), torch.zeros(1, 1)
    )
    assert values.item() == pytest.approx(loss)
    assert metrics["clip_fraction"].item() == acted
    assert metrics["ratio_deviation"].item() == pytest.approx(abs(ratio - 1))
    (gradient,) = torch.autograd.grad(values.sum(), v)
    d_mean = -0.25 * (1 + 0.64 * 0.5)
    d_log_ratio = (x_next.item() - mean) / 0.16 * d_mean
    assert gradient.item() == pytest.approx(slope * ratio * d_log_ratio)


@pytest.mark.parametrize(("ratio", "advantage", "loss", "acted", "slope"), BY_HAND)
def test_flow_grpo_with_ratio_norm_by_hand(
    ratio: float, advantage: float, loss: float, acted: float, slope: float
) -> None:
    # The step above, std .4, with two latent elements: mu - mu_old = (.1, -.02) and noise (e, .5),
    # so log r~ = (.1 e - .01) / 2, which is log(ratio) for e = 20 log(ratio) + .1.
    half, quarter = torch.tensor([[0.5]]).double(), torch.tensor([[0.25]]).double()
    v = torch.tensor([[[0.4, -0.2]]], dtype=torch.float64, requires_grad=True)
    x_t = torch.tensor([[[0.9, 0.3]]], dtype=torch.float64)
    level = torch.full((1, 1), 0.8, dtype=torch.float64)
    mean = x_t * (1 - 0.16) - 0.33 * v.detach()
    old_mean = mean - torch.tensor([0.1, -0.02], dtype=torch.float64)
    eps = torch.tensor([20 * math.log(ratio) + 0.1, 0.5], dtype=torch.float64)
    points = Points(x_t, half, quarter, level, old_mean + 0.4 * eps, old_mean, SDE.transition)
    objective = flow_grpo.build(flow_grpo.FlowGRPOOptions(ratio_norm=True, clip_range=0.2))
    values, metrics = objective.loss(
        points, {"current": v}, torch.tensor([[advantage]]).double(), torch.zeros(1, 1)
    )
    assert values.item() == pytest.approx(loss)
    assert metrics["clip_fraction"].item() == acted
    assert metrics["ratio_deviation"].item() == pytest.approx(abs(ratio - 1))
    (gradient,) = torch.autograd.grad(values.sum(), v)
    # Every element of the mean moves by -.33 of the velocity's, the log-ratio by noise / 2 of it.
    torch.testing.assert_close(gradient, (slope * ratio * eps / 2 * -0.33).expand_as(v))


def test_a_clip_of_1e_6_acts_in_float32() -> None:
    points = stored_points((64, 64, 64), torch.float32)
    objective = flow_grpo.build(flow_grpo.FlowGRPOOptions(ratio_norm=True, clip_range=1e-6))
    noise = points.x_next - points.old_mean
    inside, outside = (points.x_t / 2 - size * noise for size in (1e-5, 1e-4))
    advantages = torch.ones(2, 3)
    _, within = objective.loss(points, {"current": inside}, advantages, advantages)
    _, beyond = objective.loss(points, {"current": outside}, advantages, advantages)
    assert within["ratio_deviation"].min() > 0
    assert within["ratio_deviation"].max() < 1e-6
    assert not within["clip_fraction"].any()
    assert beyond["clip_fraction"].all()


def test_the_bounds() -> None:
    radius = flow_grpo.FlowGRPOOptions(ratio_norm=True, clip_radius=0.01)
    absolute = flow_grpo.FlowGRPOOptions(ratio_norm=True, clip_range=3e-6)
    assert NORM.clip_range(262_144) == pytest.approx(1e-6, rel=0.01)
    assert flow_grpo.build(radius).clip_range(10_000) == pytest.approx(1e-4)
    assert flow_grpo.build(absolute).clip_range(10_000) == 3e-6
    assert PLAIN.clip_range(10_000) == 0.2
    assert PLAIN.needs == frozenset()
    weights = PLAIN.weights(torch.tensor([[True, False]]))
    assert weights.dtype == torch.float32
    assert weights.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("objective", [NORM, PLAIN])
def test_a_drift_of_the_trust_radius_spreads_the_log_ratio_by_the_clip_range(
    objective: flow_grpo.FlowGRPO,
) -> None:
    points = stored_points((128, 128), torch.float64)
    elements = 128 * 128
    radius = objective.trust_radius(points)
    assert radius.shape == (2, 3)
    if objective is NORM:
        torch.testing.assert_close(radius, torch.full_like(radius, 5.1e-4))
    # Drifts of alternating sign, tiny beside the radius, under fresh noise; the log-ratio is
    # linear in such a drift, so its spread scales up to the radius.
    small = 1e-6 * radius[..., None, None]
    signs = torch.tensor([1.0, -1.0]).double().repeat(128, 64)
    points = replace(points, old_mean=points.transition(points.x_t / 2).mean - small * signs)
    std = points.transition(points.x_t).std
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(200):
        noise = torch.randn(points.x_t.shape, generator=generator, dtype=torch.float64)
        fresh = replace(points, x_next=points.old_mean + std * noise)
        drawn.append(objective.log_ratio(fresh, points.x_t / 2))
    spread = torch.stack(drawn).std() * 1e6
    assert spread.item() == pytest.approx(objective.clip_range(elements), rel=0.1)


@pytest.mark.parametrize("ratio_norm", [True, False])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradients_of_flow_grpo(ratio_norm: bool, sign: float) -> None:
    points = stored_points((2, 3), torch.float64)
    options = flow_grpo.FlowGRPOOptions(ratio_norm=ratio_norm, clip_range=2e-4)
    objective = flow_grpo.build(options)
    advantages = sign * torch.tensor([[1.0, -1.0, 0.5], [-2.0, 1.0, -1.0]], dtype=torch.float64)
    v = (points.x_t / 2 + 0.05).requires_grad_()

    def loss(current: Tensor) -> Tensor:
        return objective.loss(points, {"current": current}, advantages, advantages)[0]

    _, metrics = objective.loss(points, {"current": v}, advantages, advantages)
    assert 0 < metrics["clip_fraction"].mean() < 1
    assert torch.autograd.gradcheck(loss, (v,), eps=1e-7)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradients_of_grpo(sign: float) -> None:
    old = -torch.rand(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gap = torch.linspace(-0.5, 0.45, 5, dtype=torch.float64).expand(2, 5)
    logps = (old + gap).requires_grad_()
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    advantages = torch.tensor([sign, -sign * 0.5], dtype=torch.float64)
    objective = grpo.build(grpo.GRPOOptions(clip_range=0.2))

    def loss(current: Tensor) -> Tensor:
        return objective.loss(current, old, mask, advantages)[0]

    _, metrics = objective.loss(logps, old, mask, advantages)
    assert 0 < metrics["clip_fraction"][mask].mean() < 1
    assert torch.autograd.gradcheck(loss, (logps,))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "clip_range is required"),
        ({"clip_radius": 5.1e-4}, "clip_radius needs ratio_norm"),
        ({"clip_range": 1e-6, "clip_radius": 5.1e-4}, "clip_range and clip_radius"),
        ({"ratio_norm": True, "clip_range": 1e-6, "clip_radius": 5.1e-4}, "clip_range and clip_r"),
        ({"clip_range": 0.0}, "clip_range"),
        ({"ratio_norm": True, "clip_radius": -1.0}, "clip_radius"),
        ({"clip_range": 1e-6, "beta": 0.1}, "beta"),
    ],
)
def test_wrong_flow_options(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        flow_grpo.FlowGRPOOptions.model_validate(given)


@pytest.mark.parametrize("given", [{"clip_range": 0.0}, {"clip_range": -0.2}, {"clip": 0.2}])
def test_wrong_grpo_options(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="clip"):
        grpo.GRPOOptions.model_validate(given)
