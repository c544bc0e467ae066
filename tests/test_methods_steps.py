"""GRPO-Guard, TempFlow-GRPO, Flow-DPPO, and ratios in another unit: by hand, and their limits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from unigrpo_methods.objectives import flow_dppo, flow_grpo, grpo_guard, tempflow
from unigrpo_methods.schedulers import cps, dance_sde, flow_sde

from unigrpo_core.errors import UserError
from unigrpo_core.interfaces import ImageObjective, Scheduler
from unigrpo_core.plugin import Provider
from unigrpo_core.records import ImageSegment, Points

SDE = flow_sde.build(flow_sde.FlowSDEOptions())
DANCE = dance_sde.build(dance_sde.DanceSDEOptions())
CPS = cps.build(cps.CPSOptions())


def made(provider: Provider, **options: object) -> ImageObjective:
    return provider.build(provider.options.model_validate(options))


GUARD = grpo_guard.PROVIDER
TEMPFLOW = tempflow.PROVIDER
DPPO = flow_dppo.PROVIDER
PLAIN = flow_grpo.PROVIDER


def segment(scheduler: Scheduler, steps: slice = slice(3), latents: int = 6) -> ImageSegment:
    """Two images at some of ten steps, sampled with velocities x_t / 2; float64."""
    generator = torch.Generator().manual_seed(5)
    times = scheduler.times(10, 3.0)
    t, t_next = times[:-1][steps].expand(2, -1), times[1:][steps].expand(2, -1)
    x_t, noise = torch.randn(2, *t.shape, latents, generator=generator, dtype=torch.float64)
    level = torch.full_like(t, 0.8)
    step = scheduler.transition(x_t / 2, x_t, t, t_next, level)
    return ImageSegment(
        x_t=x_t,
        x_next=step.mean + step.std * noise,
        old_mean=step.mean,
        t=t,
        t_next=t_next,
        noise_level=level,
        latents=x_t[:, 0],
        images=x_t,
    )


def drifted(scheduler: Scheduler = SDE, size: float = 0.05) -> tuple[Points, Tensor]:
    points = made(GUARD).points(segment(scheduler), scheduler, ())
    generator = torch.Generator().manual_seed(6)
    drift = torch.randn(points.x_t.shape, generator=generator, dtype=torch.float64)
    return points, points.x_t / 2 + size * drift


ADVANTAGES = torch.tensor([[1.5, -0.5, 1.0], [-1.0, 2.0, -2.0]], dtype=torch.float64)


def values(objective: ImageObjective, points: Points, v: Tensor) -> Tensor:
    return objective.loss(points, {"current": v}, ADVANTAGES, ADVANTAGES)[0]


# --- by hand ----------------------------------------------------------------------------------

# (ratio, advantage) -> -min(ratio A, clip(ratio) A) for a clip range of 0.2, and its slope
CLIPPED = [
    (1.0, 2.0, -2.0, -2.0),
    (1.1, 2.0, -2.2, -2.0),
    (1.5, 2.0, -2.4, 0.0),
    (0.5, 2.0, -1.0, -2.0),
    (1.5, -2.0, 3.0, 2.0),
    (0.9, -2.0, 1.8, 2.0),
    (0.5, -2.0, 1.6, 0.0),
]


def one_step(mean_shift: float, log_ratio: float, *, normed: bool) -> tuple[Points, Tensor]:
    """One latent element at t = .5 -> .25 under flow_sde at noise .8 (std .4): mu - mu_old is
    ``mean_shift``, and x_next such that the plain or normalised log-ratio is the given one."""
    half, quarter = torch.tensor([[0.5]]).double(), torch.tensor([[0.25]]).double()
    v = torch.full((1, 1, 1), 0.4, dtype=torch.float64, requires_grad=True)
    mean = 0.9 + 0.4 * -0.25 + 0.64 * (0.9 + 0.5 * 0.4) * -0.25
    eps = 0.4 * log_ratio / mean_shift  # of x_next - mu_old, where normalised
    if not normed:
        eps = 0.16 * log_ratio / mean_shift + mean_shift / 2
    old_mean = torch.full((1, 1, 1), mean - mean_shift, dtype=torch.float64)
    x_t = torch.full((1, 1, 1), 0.9, dtype=torch.float64)
    level = torch.full((1, 1), 0.8, dtype=torch.float64)
    return Points(x_t, half, quarter, level, old_mean + eps, old_mean, SDE.transition), v


def slope_by_v(points: Points, *, normed: bool, mean_shift: float) -> float:
    """d log-ratio / d velocity: the mean moves by -.25 (1 + .64 .5) of it."""
    eps = (points.x_next - points.old_mean).item()
    by_mean = eps / 0.4 if normed else (eps - mean_shift) / 0.16
    return by_mean * -0.33


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), CLIPPED)
@pytest.mark.parametrize(
    ("objective", "weight", "normed"),
    [
        (made(GUARD, clip_range=0.2), 1 / 0.25, True),
        (made(TEMPFLOW, clip_range=0.2, scale=1.7), 1.7 * 0.4, False),
        (made(TEMPFLOW, clip_range=0.2, ratio_norm=True), 0.4, True),
    ],
    ids=["guard", "tempflow", "tempflow-normed"],
)
def test_weighted_surrogates_by_hand(
    objective: ImageObjective,
    weight: float,
    normed: bool,
    ratio: float,
    advantage: float,
    loss: float,
    slope: float,
) -> None:
    points, v = one_step(0.1, math.log(ratio), normed=normed)
    given = torch.tensor([[advantage]]).double()
    found, metrics = objective.loss(points, {"current": v}, given, given)
    assert found.item() == pytest.approx(weight * loss, abs=1e-9)
    assert metrics["clip_fraction"].item() == (slope == 0)
    assert metrics["ratio_deviation"].item() == pytest.approx(abs(ratio - 1))
    (gradient,) = torch.autograd.grad(found.sum(), v)
    by_v = slope_by_v(points, normed=normed, mean_shift=0.1)
    assert gradient.item() == pytest.approx(weight * slope * ratio * by_v, abs=1e-9)


# mu - mu_old = .1 at std .4: D = .01 / .32 = .03125
@pytest.mark.parametrize("threshold", [0.0312, 0.0313])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 1.5])
@pytest.mark.parametrize("advantage", [2.0, -2.0, 0.0])
def test_flow_dppo_by_hand(threshold: float, ratio: float, advantage: float) -> None:
    points, v = one_step(0.1, math.log(ratio), normed=False)
    given = torch.tensor([[advantage]]).double()
    found, metrics = made(DPPO, threshold=threshold).loss(points, {"current": v}, given, given)
    away = advantage * (ratio - 1) > 0
    kept = not (away and threshold < 0.03125)
    assert found.item() == pytest.approx(-advantage * ratio * kept, abs=1e-9)
    assert metrics["clip_fraction"].item() == (not kept)
    assert metrics["divergence"].item() == pytest.approx(0.03125)
    assert metrics["ratio_deviation"].item() == pytest.approx(abs(ratio - 1))
    (gradient,) = torch.autograd.grad(found.sum(), v)
    by_v = slope_by_v(points, normed=False, mean_shift=0.1)
    assert gradient.item() == pytest.approx(-advantage * ratio * kept * by_v, abs=1e-9)


@pytest.mark.parametrize("scheduler", [SDE, DANCE, CPS], ids=["flow", "dance", "cps"])
def test_flow_dppos_ratio_and_divergence_are_those_of_the_normal_distributions(
    scheduler: Scheduler,
) -> None:
    points, v = drifted(scheduler)
    step = points.transition(v)
    new, old = (
        torch.distributions.Normal(mean, step.std.expand_as(mean))
        for mean in (step.mean, points.old_mean)
    )
    objective = made(DPPO)
    log_ratio = (new.log_prob(points.x_next) - old.log_prob(points.x_next)).mean(2)
    torch.testing.assert_close(objective.log_ratio(points, v), log_ratio, atol=1e-12, rtol=1e-9)
    _, metrics = objective.loss(points, {"current": v}, ADVANTAGES, ADVANTAGES)
    divergence = torch.distributions.kl_divergence(old, new).mean(2)
    torch.testing.assert_close(metrics["divergence"], divergence, atol=1e-12, rtol=1e-9)
    # At the trust radius D is the threshold.
    radius = objective.trust_radius(points)[..., None]
    _, metrics = objective.loss(
        replace(points, old_mean=step.mean + radius), {"current": v}, ADVANTAGES, ADVANTAGES
    )
    torch.testing.assert_close(metrics["divergence"], torch.full_like(radius[..., 0], 1e-7))


def test_the_plain_ratio_under_cps_is_that_of_the_squared_distances() -> None:
    points, v = drifted(CPS)
    step = points.transition(v)
    far, near = ((points.x_next - mu).square().mean(2) for mu in (points.old_mean, step.mean))
    plain = made(PLAIN, clip_range=1e-4, clip_unit="latent^2")
    torch.testing.assert_close(plain.log_ratio(points, v), far - near, atol=1e-14, rtol=1e-9)
    std = points.t_next * math.sin(0.4 * math.pi)
    radius = 1e-4 * math.sqrt(6) / (2 * std)
    torch.testing.assert_close(plain.trust_radius(points), radius)
    normed = made(PLAIN, ratio_norm=True)
    eps = (points.x_next - points.old_mean) / std[..., None]
    expected = ((step.mean - points.old_mean) * eps).mean(2)
    torch.testing.assert_close(normed.log_ratio(points, v), expected)


# --- limits -----------------------------------------------------------------------------------


def test_grpo_guard_without_its_factor_is_flow_grpo_with_ratio_norm() -> None:
    points, v = drifted()
    normed = made(PLAIN, ratio_norm=True, clip_radius=0.02)
    guard = made(GUARD, clip_radius=0.02, reweight="none")
    assert torch.equal(values(guard, points, v), values(normed, points, v))
    assert guard.clip_range(100) == normed.clip_range(100) == pytest.approx(0.002)
    assert torch.equal(guard.trust_radius(points), normed.trust_radius(points))
    assert made(GUARD).clip_range(65_536) == pytest.approx(2e-6, rel=0.01)
    with_factor = values(made(GUARD, clip_radius=0.02), points, v)
    torch.testing.assert_close(
        with_factor * (points.t - points.t_next), values(normed, points, v), atol=0, rtol=1e-12
    )


@pytest.mark.parametrize("ratio_norm", [False, True])
def test_tempflow_with_equal_stds_is_flow_grpo(ratio_norm: bool) -> None:
    points, v = drifted(DANCE)
    first = points.map(lambda value: value[:, :1].expand_as(value))
    v = v[:, :1].expand_as(v)
    std = 0.8 * math.sqrt((points.t - points.t_next)[0, 0])
    bound = {"ratio_norm": ratio_norm, "clip_range": 1e-3}
    torch.testing.assert_close(
        values(made(TEMPFLOW, **bound, scale=1 / std), first, v),
        values(made(PLAIN, **bound), first, v),
        atol=0,
        rtol=1e-12,
    )
    assert made(TEMPFLOW, **bound).unit == (None if ratio_norm else "nats")


def test_flow_dppo_without_a_threshold_is_the_unclipped_policy_gradient() -> None:
    points, v = drifted()
    ratio = made(PLAIN, clip_range=1.0).log_ratio(points, v).exp()
    found, metrics = made(DPPO, threshold=1e30).loss(points, {"current": v}, ADVANTAGES, ADVANTAGES)
    torch.testing.assert_close(found, -ratio * ADVANTAGES, atol=1e-14, rtol=1e-12)
    assert not metrics["clip_fraction"].any()
    torch.testing.assert_close(found, values(made(PLAIN, clip_range=1e30), points, v))


def test_a_full_window_of_mixgrpo_is_flow_grpo_on_all_steps() -> None:
    """Every step of flow_sde has noise, so that all of them can be trained."""
    every = segment(SDE, slice(None))
    for objective in (made(PLAIN, clip_range=1e-4), made(PLAIN, ratio_norm=True)):
        points = objective.points(every, SDE, ())
        assert points.t.shape == (2, 10)
        assert (points.transition(points.x_t).std > 0).all()
        assert objective.log_ratio(points, points.x_t / 2 + 0.1).isfinite().all()


# --- gradients, and what is refused -----------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "scheduler"),
    [
        (made(GUARD, clip_range=2e-3), SDE),
        (made(TEMPFLOW, clip_range=2e-3), SDE),
        (made(TEMPFLOW, clip_range=2e-3, ratio_norm=True), DANCE),
        (made(DPPO, threshold=1e-4), SDE),
        (made(DPPO, threshold=1e-4), CPS),
        (made(PLAIN, clip_range=2e-3, clip_unit="latent^2"), CPS),
    ],
    ids=["guard", "tempflow", "tempflow-normed", "dppo", "dppo-cps", "flow_grpo-cps"],
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradients(objective: ImageObjective, scheduler: Scheduler, sign: float) -> None:
    points, v = drifted(scheduler, size=0.3)
    given = sign * ADVANTAGES
    v.requires_grad_()
    _, metrics = objective.loss(points, {"current": v}, given, given)
    assert 0 < metrics["clip_fraction"].mean() < 1
    assert not any(metric.requires_grad for metric in metrics.values())
    assert torch.autograd.gradcheck(
        lambda free: objective.loss(points, {"current": free}, given, given)[0], (v,), eps=1e-7
    )


@pytest.mark.parametrize("provider", [PLAIN, GUARD, TEMPFLOW, DPPO], ids=lambda one: one.name)
def test_a_step_without_noise_is_refused(provider: Provider) -> None:
    bound = {"clip_range": 1e-4} if provider in (PLAIN, TEMPFLOW) else {}
    with pytest.raises(UserError, match=r"t = 0\.25 to 0 .* leave it out of image\.window"):
        made(provider, **bound).points(segment(CPS, slice(7, None)), CPS, ())


@pytest.mark.parametrize(
    ("provider", "given", "message"),
    [
        (GUARD, {"clip_range": 1e-6, "clip_radius": 5.1e-4}, "clip_range and clip_radius"),
        (GUARD, {"clip_range": 0.0}, "clip_range"),
        (GUARD, {"reweight": "dt"}, "reweight"),
        (GUARD, {"ratio_norm": True}, "ratio_norm"),
        (TEMPFLOW, {}, "clip_range is required"),
        (TEMPFLOW, {"clip_radius": 1e-3}, "clip_radius needs ratio_norm"),
        (TEMPFLOW, {"clip_range": 1e-4, "scale": 0.0}, "scale"),
        (PLAIN, {"ratio_norm": True, "clip_unit": "latent^2"}, "clip_unit .* leave it out"),
        (PLAIN, {"clip_range": 1e-4, "clip_unit": "bits"}, "clip_unit"),
        (DPPO, {"threshold": 0.0}, "threshold"),
        (DPPO, {"threshold": math.inf}, "threshold"),
        (DPPO, {"clip_range": 1e-4}, "clip_range"),
    ],
)
def test_wrong_options(provider: Provider, given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        made(provider, **given)


def test_the_unit_is_stated_where_it_matters() -> None:
    assert made(PLAIN, clip_range=1e-4).unit == "nats"
    assert made(PLAIN, clip_range=1e-4, clip_unit="latent^2").unit == "latent^2"
    assert made(PLAIN, ratio_norm=True).unit is None
    assert made(GUARD).unit is None
    assert made(DPPO).unit is None
    weights = made(DPPO).weights(torch.tensor([[True, False]]))
    assert weights.tolist() == made(GUARD).weights(torch.tensor([[True, False]])).tolist()
    assert weights.tolist() == [[1.0, 0.0]]
