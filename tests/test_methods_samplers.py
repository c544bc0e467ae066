"""The neighbours' schedulers against their papers' formulas in float64, and their limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from unigrpo_methods.schedulers import cps, dance_sde, flow_sde, ode

from unigrpo_core.errors import UserError
from unigrpo_core.interfaces import Scheduler

DANCE = dance_sde.build(dance_sde.DanceSDEOptions())
CPS = cps.build(cps.CPSOptions())
ODE = ode.build(ode.ODEOptions())


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def steps_of(
    scheduler: Scheduler, noise_level: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """t, t_next and noise level [1, 10] of a grid of ten steps with shift 3."""
    times = scheduler.times(10, 3.0).to(dtype)
    t, t_next = times[None, :-1], times[None, 1:]
    return t, t_next, torch.full_like(t, noise_level)


def dance_formula(
    v: np.ndarray, x: np.ndarray, t: np.ndarray, t_next: np.ndarray, eta: float
) -> tuple[np.ndarray, np.ndarray]:
    """As DanceGRPO writes it: a score of the predicted data, and noise of a constant rate."""
    data = x - t * v
    score = -(x - data * (1 - t)) / t**2
    return x + (v - eta**2 / 2 * score) * (t_next - t), eta * np.sqrt(t - t_next)


def cps_formula(
    v: np.ndarray, x: np.ndarray, t: np.ndarray, t_next: np.ndarray, eta: float
) -> tuple[np.ndarray, np.ndarray]:
    """As CPS writes it: predicted data, predicted noise, and what of the noise's square is left."""
    std = t_next * np.sin(eta * np.pi / 2)
    data, noise = x - t * v, x + (1 - t) * v
    return (1 - t_next) * data + np.sqrt(t_next**2 - std**2) * noise, std


@pytest.mark.parametrize(
    ("scheduler", "formula"), [(DANCE, dance_formula), (CPS, cps_formula)], ids=["dance", "cps"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eta", [0.3, 0.8, 1.0])
def test_mean_and_std_are_the_papers(
    scheduler: Scheduler, formula, dtype: torch.dtype, eta: float
) -> None:
    points = steps_of(scheduler, eta, dtype)
    v, x = (normals(1, 10, 8, 9, seed=seed).to(dtype) for seed in (1, 2))
    step = scheduler.transition(v, x, *points)
    assert step.mean.dtype == step.std.dtype == dtype
    assert step.std.shape == (1, 10, 1, 1)
    t, t_next = (one[..., None, None].double().numpy() for one in points[:2])
    mean, std = formula(v.double().numpy(), x.double().numpy(), t, t_next, eta)
    exact = 1e-6 if dtype == torch.float32 else 1e-13
    np.testing.assert_allclose(step.mean, mean, rtol=0, atol=exact)
    np.testing.assert_allclose(step.std, std, rtol=0, atol=exact)


@pytest.mark.parametrize("scheduler", [DANCE, CPS], ids=["dance", "cps"])
def test_at_noise_0_they_are_exactly_the_ode(scheduler: Scheduler) -> None:
    t, t_next, none = steps_of(scheduler, 0.0, torch.float32)
    v, x = normals(1, 10, 4, 5, seed=1), normals(1, 10, 4, 5, seed=2)
    euler = ODE.transition(v, x, t, t_next, none).mean
    step = scheduler.transition(v, x, t, t_next, none)
    assert torch.equal(step.mean, euler)
    assert not step.std.any()
    mixed = torch.tensor([[0.0, 0.8] * 5])
    step = scheduler.transition(v, x, t, t_next, mixed)
    assert torch.equal(step.mean[:, ::2], euler[:, ::2])
    assert (step.std[:, 1:9:2] > 0).all()


def test_dance_sde_is_flow_sde_at_a_noise_level_that_makes_its_rate_constant() -> None:
    """sigma_t = a sqrt(t / (1 - t)) is eta for a = eta sqrt((1 - t) / t); t = 1 left out."""
    t, t_next, eta = (one[:, 1:] for one in steps_of(DANCE, 0.3, torch.float64))
    v, x = normals(1, 9, 4, 5, seed=1).double(), normals(1, 9, 4, 5, seed=2).double()
    dance = DANCE.transition(v, x, t, t_next, eta)
    flow = flow_sde.build(flow_sde.FlowSDEOptions()).transition(
        v, x, t, t_next, eta * ((1 - t) / t).sqrt()
    )
    torch.testing.assert_close(dance.mean, flow.mean, atol=1e-13, rtol=0)
    torch.testing.assert_close(dance.std, flow.std, atol=1e-13, rtol=0)


def test_the_last_step() -> None:
    """Under cps it is the predicted data, without noise; under dance_sde noise is left."""
    t, t_next, noise = (one[:, -1:] for one in steps_of(CPS, 0.3, torch.float64))
    v, x = normals(1, 1, 7, seed=1).double(), normals(1, 1, 7, seed=2).double()
    step = CPS.transition(v, x, t, t_next, noise)
    assert not step.std.any()
    torch.testing.assert_close(step.mean, x - t[..., None] * v)
    assert t.item() == pytest.approx(0.25)
    assert DANCE.transition(v, x, t, t_next, noise).std.item() == pytest.approx(0.15)


def test_the_log_ratio_of_cps_is_that_of_the_squared_distances() -> None:
    mean, old, x = (normals(2, 3, 64, 64, seed=seed) for seed in (1, 2, 3))
    mean = old + 1e-3 * mean
    std = torch.tensor([0.5, 1.0, 2.0]).reshape(1, 3, 1, 1)
    step = cps.DistanceTransition(mean, std)
    far = [(x.double() - mu.double()).square().mean((2, 3)) for mu in (mean, old)]
    assert (step.log_ratio(x, old) - (far[1] - far[0])).abs().max() < 1e-9
    assert not step.log_ratio(x, mean).any()
    assert step.unit_shift.flatten().tolist() == [1.0, 0.5, 0.25]
    assert (CPS.unit, DANCE.unit) == ("latent^2", "nats")


def test_cps_refuses_more_noise_than_there_is() -> None:
    one = torch.ones(1, 2)
    with pytest.raises(UserError, match=r"from 0 to 1 .* got 1\.3: see image\.scheduler\.noise"):
        CPS.transition(one[..., None], one[..., None], one, one / 2, torch.tensor([[0.5, 1.3]]))


@pytest.mark.parametrize("scheduler", [DANCE, CPS], ids=["dance", "cps"])
@pytest.mark.parametrize("noise_level", [0.0, 0.8])
@pytest.mark.parametrize("part", ["mean", "log_ratio"])
def test_gradients_by_velocity_and_latents(
    scheduler: Scheduler, noise_level: float, part: str
) -> None:
    if part == "log_ratio" and scheduler is DANCE and noise_level == 0:
        return  # a point mass has none
    times = scheduler.times(3, 3.0)
    points = times[None, :-1], times[None, 1:], torch.full((1, 3), noise_level).double()
    v, x, x_next, old_mean = (normals(1, 3, 2, 2, seed=seed).double() for seed in (1, 2, 3, 4))

    def value(v: Tensor, x: Tensor) -> Tensor:
        step = scheduler.transition(v, x, *points)
        return step.mean if part == "mean" else step.log_ratio(x_next, old_mean)

    assert torch.autograd.gradcheck(value, (v.requires_grad_(), x.requires_grad_()))


@pytest.mark.parametrize("scheduler", [DANCE, CPS], ids=["dance", "cps"])
def test_times_are_those_of_the_ode_also_without_torch(scheduler: Scheduler) -> None:
    for steps, shift in ((1, 1.0), (10, 3.0)):
        assert torch.equal(scheduler.times(steps, shift), ODE.times(steps, shift))
        plain = scheduler.plain_times(steps, shift)
        np.testing.assert_allclose(plain, scheduler.times(steps, shift), rtol=1e-12)
