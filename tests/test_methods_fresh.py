"""Objectives at freshly noised points: the points, and DiffusionNFT, AWM and FPO by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from unigrpo_methods.objectives import awm, diffusion_nft, fpo, fresh
from unigrpo_methods.schedulers import flow_sde, ode

from unigrpo_core.interfaces import ImageObjective
from unigrpo_core.keys import Key
from unigrpo_core.records import ImageSegment, Points

SDE = flow_sde.build(flow_sde.FlowSDEOptions())
ODE = ode.build(ode.ODEOptions())


def segment(rows: int, *axes: int, dtype: torch.dtype = torch.float64) -> ImageSegment:
    generator = torch.Generator().manual_seed(rows)
    latents = torch.randn(rows, *axes, generator=generator, dtype=dtype)
    steps, times = latents[:, None], torch.zeros(rows, 1, dtype=dtype)
    return ImageSegment(steps, steps, steps, times, times, times, latents, latents)


def keys(rows: int) -> list[Key]:
    return [Key((3, row)) for row in range(rows)]


def drawn(*axes: int, rows: int = 2, dtype: torch.dtype = torch.float64, **options) -> Points:
    given = fresh.FreshOptions.model_validate(options)
    return fresh.fresh_points(segment(rows, *axes, dtype=dtype), SDE, keys(rows), given)


def with_old(points: Points, v_old: Tensor) -> Points:
    """As the trainer sets them."""
    return replace(points, old_mean=points.transition(v_old).mean)


def build(name: str, **options) -> ImageObjective:
    module = {"awm": awm, "fpo": fpo, "diffusion_nft": diffusion_nft}[name]
    return module.PROVIDER.build(module.PROVIDER.options.model_validate(options))


# --- the points -------------------------------------------------------------------------------


def test_points_are_the_image_and_keyed_noise_mixed() -> None:
    points = drawn(3, 4, times=5)
    image = segment(2, 3, 4).latents
    for row, key in enumerate(keys(2)):
        noise = torch.from_numpy(key.child("noise").normal((5, 3, 4))).double()
        u = key.child("times").uniform(5)
        for k in range(5):
            t = (k + u[k]) / 5
            assert points.t[row, k].item() == pytest.approx(max(t, 0.01), abs=1e-12)
            mixed = (1 - t) * image[row] + t * noise[k]
            torch.testing.assert_close(points.x_t[row, k], mixed)
            v = noise[k] - image[row]
            torch.testing.assert_close(fresh.target(points)[row, k], v, atol=1e-9, rtol=1e-9)


def test_a_step_leads_to_the_data_that_the_velocity_predicts_under_any_scheduler() -> None:
    for scheduler in (SDE, ODE):
        points = replace(drawn(3, 4), kernel=scheduler.transition)
        step = points.transition(fresh.target(points))
        assert not step.std.any()
        torch.testing.assert_close(step.mean, points.x_next, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("given", "quantiles"),
    [
        ({}, (0.25, 0.5, 0.75)),
        ({"density": "logit_normal"}, (0.3375, 0.5, 0.6625)),  # sigmoid(-+.6745)
        ({"shift": 3.0}, (0.5, 0.75, 0.9)),  # 3 t / (1 + 2 t)
    ],
)
def test_times_have_the_density_asked_for(given: dict, quantiles: tuple[float, ...]) -> None:
    points = drawn(1, rows=500, times=2, **given)
    assert 0.01 <= points.t.min() < points.t.max() <= 1
    assert (points.t[:, 0] < points.t[:, 1]).all()
    levels = torch.tensor([0.25, 0.5, 0.75]).double()
    assert points.t.flatten().quantile(levels).tolist() == pytest.approx(quantiles, abs=0.03)


def test_a_gain_is_exact_in_float32_where_two_errors_are_not() -> None:
    points = drawn(16, 64, 64, dtype=torch.float32, times=2)
    v_old = fresh.target(points) + torch.randn(points.x_t.shape, generator=torch.Generator())
    v = v_old - 1e-5 * (v_old - fresh.target(points))
    points = with_old(points, v_old)
    exact = points.map(lambda x: x.double())
    errors = [
        (exact.transition(x.double()).mean - exact.x_next).square().mean((2, 3, 4))
        for x in (v_old, v)
    ]
    expected = (errors[0] - errors[1]) / exact.t.square()
    assert expected.abs().max() < 1e-4
    torch.testing.assert_close(fresh.gain(points, v).double(), expected, atol=2e-8, rtol=1e-3)
    assert not fresh.gain(points, v_old).any()


# --- AWM and FPO ------------------------------------------------------------------------------

# (ratio, advantage) -> (loss, does the clip act, derivative by the ratio), clip range 0.2
BY_HAND = [
    (1.0, 2.0, -2.0, 0.0, -2.0),
    (1.1, 2.0, -2.2, 0.0, -2.0),
    (1.5, 2.0, -2.4, 1.0, 0.0),
    (0.5, 2.0, -1.0, 0.0, -2.0),
    (1.1, -2.0, 2.2, 0.0, 2.0),
    (1.5, -2.0, 3.0, 0.0, 2.0),
    (0.9, -2.0, 1.8, 0.0, 2.0),
    (0.5, -2.0, 1.6, 1.0, 0.0),
]

# How log p falls with the error E = |v - v*|^2 at t = .4, and its slope.
LOG_PROBS = {
    "awm": ({}, lambda e: -e, lambda e: -1.0),
    "awm t": ({"weighting": "t"}, lambda e: -0.4 * e, lambda e: -0.4),
    "awm t^2": ({"weighting": "t^2"}, lambda e: -0.16 * e, lambda e: -0.16),
    "awm ghuber": (
        {"weighting": "t", "power": 0.25},
        lambda e: -0.4 * e**0.25 / 0.25,
        lambda e: -0.4 * e**-0.75,
    ),
    "fpo": ({}, lambda e: -e, lambda e: -1.0),
    "fpo noise": ({"error": "noise"}, lambda e: -0.36 * e, lambda e: -0.36),
}


@pytest.mark.parametrize("which", LOG_PROBS)
@pytest.mark.parametrize(("ratio", "advantage", "loss", "acted", "slope"), BY_HAND)
def test_ratios_by_hand(
    which: str, ratio: float, advantage: float, loss: float, acted: float, slope: float
) -> None:
    """x0 = (1, -.5), eps = (.3, .7) at t = .4, so v* = (-.7, 1.2); v is off by (2.4, -2.2), an
    error of 5.3; the old velocity is off by such an s in both that log p differs by log(ratio)."""
    options, log_prob, by_error = LOG_PROBS[which]
    objective = build(which.split()[0], clip_range=0.2, **options)
    x0, eps = torch.tensor([[[[1.0, -0.5]], [[0.3, 0.7]]]]).double().unbind(1)
    v = torch.tensor([[[1.7, -1.0]]], dtype=torch.float64, requires_grad=True)
    low, high = 0.0, 50.0
    for _ in range(100):  # old error by bisection: log p falls with it
        middle = (low + high) / 2
        above = log_prob(5.3) - log_prob(middle) < math.log(ratio)
        low, high = (middle, high) if above else (low, middle)
    v_old = (eps - x0)[None] + math.sqrt(middle)
    t, x_t, data = torch.full((1, 1), 0.4).double(), (0.6 * x0 + 0.4 * eps)[None], x0[None]
    points = with_old(Points(x_t, t, 0 * t, 0 * t, data, data, SDE.transition), v_old)
    values, metrics = objective.loss(
        points, {"current": v}, torch.tensor([[advantage]]).double(), torch.zeros(1, 1)
    )
    assert values.item() == pytest.approx(loss, abs=1e-6)
    assert metrics["clip_fraction"].item() == acted
    assert metrics["ratio_deviation"].item() == pytest.approx(abs(ratio - 1), abs=1e-6)
    assert metrics["matching_error"].item() == pytest.approx(5.3, abs=1e-6)
    (gradient,) = torch.autograd.grad(values.sum(), v)
    # E = mean((v - v*)^2): its derivative is (v - v*) for two elements.
    expected = [slope * ratio * by_error(5.3) * off for off in (2.4, -2.2)]
    assert gradient.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def off_policy() -> tuple[Points, Tensor, Tensor, Tensor]:
    """Points, the old and the current velocities, advantages of both signs."""
    points = drawn(2, 3)
    v_old = points.x_t.sin() + 0.1
    advantages = torch.tensor([[1.0, -1.0, 0.5], [-2.0, 1.0, -1.0]], dtype=torch.float64)
    return with_old(points, v_old), v_old, v_old + 0.03 * points.x_t.cos(), advantages


def gradient(
    objective: ImageObjective, points: Points, v: Tensor, v_old: Tensor, advantages: Tensor
) -> Tensor:
    v = v.detach().requires_grad_()
    values, _ = objective.loss(points, {"current": v, "old": v_old}, advantages, advantages)
    return torch.autograd.grad(values.sum(), v)[0]


@pytest.mark.parametrize("which", LOG_PROBS)
def test_at_ratio_1_the_gradient_is_of_advantage_weighted_flow_matching(which: str) -> None:
    points, v_old, _, advantages = off_policy()
    objective = build(which.split()[0], **LOG_PROBS[which][0])
    v = v_old.detach().requires_grad_()
    error = (v - fresh.target(points)).square().mean((2, 3))
    factor = {
        "awm": 1,
        "awm t": points.t,
        "awm t^2": points.t**2,
        "awm ghuber": points.t * error.detach() ** -0.75,
        "fpo": 1,
        "fpo noise": (1 - points.t) ** 2,
    }[which]
    (expected,) = torch.autograd.grad((advantages * factor * error).sum(), v)
    torch.testing.assert_close(gradient(objective, points, v_old, v_old, advantages), expected)


def test_awm_and_fpo_are_one_at_equal_weights_and_clips() -> None:
    points, _, v, advantages = off_policy()
    one, other = (build(name, clip_range=0.01) for name in ("awm", "fpo"))
    given = (points, {"current": v}, advantages, advantages)
    values, metrics = one.loss(*given)
    torch.testing.assert_close(values, other.loss(*given)[0], atol=0, rtol=0)
    assert 0 < metrics["clip_fraction"].mean() < 1
    apart = build("fpo", clip_range=0.01, error="noise").loss(*given)[0]
    assert not torch.allclose(values, apart)


@pytest.mark.parametrize("which", LOG_PROBS)
def test_a_drift_of_the_trust_radius_spreads_the_log_ratio_by_the_clip_range(which: str) -> None:
    objective = build(which.split()[0], clip_range=1e-5, **LOG_PROBS[which][0])
    points = drawn(12, 12, rows=150)
    points = replace(points, t=torch.tensor([[0.3, 0.5, 0.8]]).double().expand(150, 3))
    generator = torch.Generator().manual_seed(2)
    off = torch.randn(points.x_t.shape, generator=generator, dtype=torch.float64)
    points = with_old(points, fresh.target(points) + off)
    shift = objective.trust_radius(points)[..., None, None] * torch.ones(12, 12).double()
    v = (points.x_t - points.old_mean - shift) / points.t[..., None, None]
    spread = objective.log_ratio(points, v).std(0)
    assert spread.tolist() == pytest.approx([1e-5] * 3, rel=0.15)


def test_an_error_that_vanishes_keeps_the_log_ratio_finite() -> None:
    points = with_old(drawn(2, 3), drawn(2, 3).x_t)
    objective = build("awm", weighting="t", power=0.25)
    v = fresh.target(points).requires_grad_()
    found = objective.log_ratio(points, v)
    (gradient,) = torch.autograd.grad(found.sum(), v)
    assert (found > 0).all()
    assert found.isfinite().all()
    assert gradient.isfinite().all()


# --- DiffusionNFT -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advantage", "r"),
    [(0.0, 0.5), (1.0, 0.6), (-2.5, 0.25), (5.0, 1.0), (7.0, 1.0), (-5.0, 0.0), (-9.0, 0.0)],
)
@pytest.mark.parametrize("weighting", ["velocity", "self_normalised"])
def test_diffusion_nft_by_hand(advantage: float, r: float, weighting: str) -> None:
    """The point above, v off by (.9, -.6), v_old by (.5, .2), b = .5: v+ is off by (.7, -.2), so by
    .265 in the mean square and .45 in the mean; v- by (.3, .6), .225 and .45."""
    x0, eps = torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, 0.7]).double()
    v = (eps - x0 + torch.tensor([0.9, -0.6])).reshape(1, 1, 2).requires_grad_()
    v_old = (eps - x0 + torch.tensor([0.5, 0.2])).reshape(1, 1, 2)
    t = torch.full((1, 1), 0.4, dtype=torch.float64)
    data = x0.reshape(1, 1, 2)
    x_t = data + 0.4 * (eps - x0)
    points = with_old(Points(x_t, t, 0 * t, 0 * t, data, data, SDE.transition), v_old)
    objective = build("diffusion_nft", beta=0.5, weighting=weighting)
    values, metrics = objective.loss(
        points, {"current": v, "old": v_old}, torch.tensor([[advantage]]).double(), t
    )
    factor = 1.0 if weighting == "velocity" else 0.4 / 0.45  # t^2 / (t .45), in both
    assert values.item() == pytest.approx(factor * (r * 0.265 + (1 - r) * 0.225), abs=1e-6)
    assert metrics["optimality"].item() == pytest.approx(r, abs=1e-6)
    assert metrics["positive_error"].item() == pytest.approx(factor * 0.265, abs=1e-6)
    assert metrics["negative_error"].item() == pytest.approx(factor * 0.225, abs=1e-6)
    assert objective.log_ratio(points, v).item() == pytest.approx(0.145 - 0.585, abs=1e-6)
    (gradient,) = torch.autograd.grad(values.sum(), v)
    expected = [factor * 0.5 * (r * p - (1 - r) * n) for p, n in ((0.7, 0.3), (-0.2, 0.6))]
    assert gradient.flatten().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("weighting", ["velocity", "self_normalised"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_advantage_nft_leaves_the_old_velocity_alone(
    weighting: str, dtype: torch.dtype
) -> None:
    points, v_old, _, advantages = off_policy()
    points, v_old = points.map(lambda x: x.to(dtype)), v_old.to(dtype)
    objective = build("diffusion_nft", weighting=weighting)
    found = gradient(objective, points, v_old, v_old, 0 * advantages.to(dtype))
    assert not found.any()


def test_at_the_old_velocity_nft_is_flow_matching_weighted_by_clipped_advantages() -> None:
    points, v_old, _, advantages = off_policy()
    objective = build("diffusion_nft", beta=0.3, scale=1.5)
    found = gradient(objective, points, v_old, v_old, advantages)
    r = 0.5 + 0.5 * (advantages / 1.5).clamp(-1, 1)
    slope = (2 * 0.3 * (2 * r - 1) / 6)[..., None, None]
    torch.testing.assert_close(found, slope * (v_old - fresh.target(points)))
    # AWM's gradient at ratio 1, times b / Z, where no advantage is cut
    mild = advantages / 2
    scaled = 0.3 / 1.5 * gradient(build("awm"), points, v_old, v_old, mild)
    torch.testing.assert_close(gradient(objective, points, v_old, v_old, mild), scaled)


# --- all of them ------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("which", [*LOG_PROBS, "diffusion_nft"])
def test_gradients(which: str, sign: float) -> None:
    points, v_old, v, advantages = off_policy()
    given = LOG_PROBS.get(which, ({"beta": 0.7},))[0]
    clip = {} if which == "diffusion_nft" else {"clip_range": 0.01}
    objective = build(which.split()[0], **given, **clip)

    def loss(current: Tensor) -> Tensor:
        velocities = {"current": current, "old": v_old}
        return objective.loss(points, velocities, sign * advantages, advantages)[0]

    assert torch.autograd.gradcheck(loss, (v.requires_grad_(),), eps=1e-7, atol=1e-5)


def test_the_bounds() -> None:
    points, *_ = off_policy()
    assert build("awm").clip_range(9) == 1e-5
    assert build("fpo").clip_range(9) == 0.05
    nft = build("diffusion_nft")
    assert nft.clip_range(9) == math.inf
    assert nft.trust_radius(points).tolist() == [[math.inf] * 3] * 2
    assert nft.needs == {"old"}
    for name in ("awm", "fpo", "diffusion_nft"):
        weights = build(name).weights(torch.tensor([[True, False]]))
        assert weights.dtype == torch.float32
        assert weights.tolist() == [[1.0, 0.0]]
        assert build(name).unit is None
        assert build(name, times=5).count(2) == 5


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("awm", {"times": 0}, "times"),
        ("awm", {"clip_range": 0.0}, "clip_range"),
        ("awm", {"power": 0.0}, "power"),
        ("awm", {"power": 2.0}, "power"),
        ("awm", {"weighting": "ghuber"}, "weighting"),
        ("fpo", {"error": "eps"}, "error"),
        ("fpo", {"shift": 0.0}, "shift"),
        ("fpo", {"density": "normal"}, "density"),
        ("diffusion_nft", {"beta": 0.0}, "beta"),
        ("diffusion_nft", {"scale": -5.0}, "scale"),
        ("diffusion_nft", {"clip_range": 1e-4}, "clip_range"),
    ],
)
def test_wrong_options(name: str, given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(name, **given)
