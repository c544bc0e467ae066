"""Schedulers against the closed form in float64 and against diffusers."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from pydantic import ValidationError
from unigrpo_methods.schedulers import flow_sde, ode
from unigrpo_methods.schedulers.gaussian import GaussianTransition

SDE = flow_sde.build(flow_sde.FlowSDEOptions())
ODE = ode.build(ode.ODEOptions())


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def closed_form(
    v: np.ndarray, x: np.ndarray, t: np.ndarray, t_next: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std of a step as the paper writes them, in float64; all of one shape."""
    v, x, t, t_next, noise = (np.float64(array) for array in (v, x, t, t_next, noise))
    dt = t_next - t
    sigma = noise * np.sqrt(t / (1 - np.where(t == 1, t_next, t)))
    drift = v + sigma**2 / (2 * t) * (x + (1 - t) * v)
    return x + drift * dt, sigma * np.sqrt(-dt)


@pytest.mark.parametrize("grid", ["linear", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sde_mean_std_and_log_ratio_are_the_closed_form(grid: str, dtype: torch.dtype) -> None:
    scheduler = flow_sde.build(flow_sde.FlowSDEOptions.model_validate({"grid": grid}))
    times = scheduler.times(10, 3.0).to(dtype)
    t, t_next = times[None, :-1].expand(2, -1), times[None, 1:].expand(2, -1)
    noise = torch.tensor([[0.8], [0.3]], dtype=dtype).expand(2, 10)
    v, v_old, x, eps = (normals(2, 10, 8, 9, seed=seed).to(dtype) for seed in (1, 2, 3, 4))
    v_old = v + 0.1 * v_old
    step = scheduler.transition(v, x, t, t_next, noise)
    old = scheduler.transition(v_old, x, t, t_next, noise)
    x_next = old.mean + old.std * eps
    ours = step.log_ratio(x_next, old.mean)
    assert step.mean.dtype == step.std.dtype == ours.dtype == dtype
    assert step.std.shape == (2, 10, 1, 1)

    at = [y[..., None, None].expand(2, 10, 8, 9).numpy() for y in (t, t_next, noise)]
    mean, std = closed_form(v.numpy(), x.numpy(), *at)
    old_mean, _ = closed_form(v_old.numpy(), x.numpy(), *at)
    new_term, old_term = (
        -((np.float64(x_next.numpy()) - mu) ** 2) / (2 * std**2) for mu in (mean, old_mean)
    )
    log_ratio = (new_term - old_term).mean((2, 3))
    assert np.abs(log_ratio).max() > 1e-3
    exact = 1e-6 if dtype == torch.float32 else 1e-13
    np.testing.assert_allclose(step.mean, mean, rtol=0, atol=exact)
    np.testing.assert_allclose(step.std.expand_as(v), std, rtol=0, atol=exact)
    # float32 knows a mean of 1 to 6e-8: over the std of a last step, .003, that is 2e-6.
    wide = std[..., 0, 0] > (0.05 if dtype == torch.float32 else 0)
    assert wide.sum() >= 18
    np.testing.assert_allclose(ours.numpy()[wide], log_ratio[wide], rtol=0, atol=exact)


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_first_step_is_finite_and_as_documented(steps: int) -> None:
    times = SDE.times(steps, 3.0).float()
    t, t_next = times[:1, None], times[1:2, None]
    v, x = normals(1, 1, 64, seed=1), normals(1, 1, 64, seed=2)
    step = SDE.transition(v, x, t, t_next, torch.full((1, 1), 0.8))
    torch.testing.assert_close(step.mean, x * (1 - 0.32) + v * (t_next - t)[..., None])
    assert step.std.item() == pytest.approx(0.8, abs=1e-6)


def test_a_bfloat16_velocity_is_computed_in_float32() -> None:
    t, t_next, noise = torch.tensor([[0.6]]), torch.tensor([[0.5]]), torch.tensor([[0.8]])
    v, x = normals(1, 1, 50, seed=1).bfloat16(), normals(1, 1, 50, seed=2)
    low = SDE.transition(v, x, t, t_next, noise).mean
    assert low.dtype == torch.float32
    assert torch.equal(low, SDE.transition(v.float(), x, t, t_next, noise).mean)


def test_noise_level_zero_is_exactly_the_euler_step_also_in_a_mixed_batch() -> None:
    times = SDE.times(8, 3.0).float()
    t, t_next = times[None, :-1], times[None, 1:]
    noise = torch.tensor([[0.0, 0.8, 0.0, 0.8, 0.0, 0.0, 0.8, 0.0]])
    v, x = normals(1, 8, 4, 5, seed=1), normals(1, 8, 4, 5, seed=2)
    step = SDE.transition(v, x, t, t_next, noise)
    euler = ODE.transition(v, x, t, t_next, torch.zeros(1, 8))
    still = noise[0] == 0
    assert torch.equal(euler.mean, x + v * (t_next - t)[..., None, None])
    assert torch.equal(step.mean[:, still], euler.mean[:, still])
    assert not step.std[:, still].any()
    assert not euler.std.any()
    assert (step.std[:, ~still] > 0).all()
    assert (step.mean[:, ~still] != euler.mean[:, ~still]).any()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("grid", ["linear", "diffusers"])
@pytest.mark.parametrize("method", [flow_sde, ode])
def test_steps_at_noise_0_are_those_of_diffusers(
    method: ModuleType, grid: str, shift: float
) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    if grid == "linear":
        theirs.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6).tolist())
    else:
        theirs.set_timesteps(6)
    scheduler = method.build(method.PROVIDER.options.model_validate({"grid": grid}))
    times = scheduler.times(6, shift).float()
    x = expected = normals(1, 1, 3, 4, seed=3)
    for step, timestep in enumerate(theirs.timesteps):
        v = normals(1, 1, 3, 4, seed=10 + step)
        expected = theirs.step(v, timestep, expected).prev_sample
        t, t_next = times[step].reshape(1, 1), times[step + 1].reshape(1, 1)
        x = scheduler.transition(v, x, t, t_next, torch.zeros(1, 1)).mean
        torch.testing.assert_close(x, expected, atol=1e-6, rtol=0)


def test_the_ode_refuses_noise() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"noise level 0 only, got 0\.5"):
        ODE.transition(one[..., None], one[..., None], one, one / 2, one / 2)
    assert not ODE.stochastic
    assert SDE.stochastic


@pytest.mark.parametrize("steps", [1, 2, 10, 25, 50])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.93])
@pytest.mark.parametrize("grid", ["linear", "diffusers"])
def test_grids_are_those_of_diffusers(grid: str, steps: int, shift: float) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    if grid == "linear":
        theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    else:
        theirs.set_timesteps(steps)
    for method in (flow_sde, ode):
        options = method.PROVIDER.options.model_validate({"grid": grid})
        times = method.build(options).times(steps, shift)
        assert times.dtype == torch.float64
        assert times.shape == (steps + 1,)
        assert times[0] == 1
        assert times[-1] == 0
        assert (times.diff() < 0).all()
        torch.testing.assert_close(times.float(), theirs.sigmas, atol=2e-7, rtol=1e-6)


@pytest.mark.parametrize("steps", [2, 10, 50])
@pytest.mark.parametrize("terminal", [0.02, 0.6])
@pytest.mark.parametrize("shift", [0.5, 3.0])
@pytest.mark.parametrize("grid", ["linear", "diffusers"])
def test_grids_with_a_terminal_are_those_of_diffusers(
    grid: str, shift: float, terminal: float, steps: int
) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift, shift_terminal=terminal)
    if grid == "linear":
        theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    else:
        theirs.set_timesteps(steps)
    for method in (flow_sde, ode):
        stated = {"grid": grid, "shift_terminal": terminal}
        times = method.build(method.PROVIDER.options.model_validate(stated)).times(steps, shift)
        assert times.dtype == torch.float64
        assert times[0] == 1
        assert times[-2].item() == pytest.approx(terminal, abs=1e-15)
        assert times[-1] == 0
        assert (times.diff() < 0).all()
        torch.testing.assert_close(times.float(), theirs.sigmas, atol=2e-7, rtol=1e-6)


def test_a_terminal_by_hand() -> None:
    """The times 1, .75, .5, .25 are stretched by .98 / .75; one step has nothing to stretch."""
    scheduler = ode.build(ode.ODEOptions(shift_terminal=0.02))
    found = scheduler.times(4, 1.0).tolist()
    assert found == pytest.approx([1, 1 - 0.98 / 3, 1 - 2 * 0.98 / 3, 0.02, 0], abs=1e-15)
    assert scheduler.times(1, 3.0).tolist() == scheduler.plain_times(1, 3.0) == [1, 0]


def test_the_diffusers_grid_shifts_twice() -> None:
    options = flow_sde.FlowSDEOptions(grid="diffusers")
    assert flow_sde.build(options).times(10, 3.0)[-2].item() == pytest.approx(0.009, abs=1e-4)
    assert SDE.times(10, 3.0)[-2].item() == pytest.approx(0.25)


def test_impossible_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 step; got 0"):
        SDE.times(0, 1.0)
    with pytest.raises(ValueError, match=r"shift is positive .* got 0"):
        SDE.times(4, 0.0)
    with pytest.raises(ValidationError, match="grid"):
        flow_sde.FlowSDEOptions.model_validate({"grid": "cosine"})
    for terminal in (0.0, 1.0):
        with pytest.raises(ValidationError, match="shift_terminal"):
            ode.ODEOptions(shift_terminal=terminal)
    with pytest.raises(ValidationError, match="noise_level"):
        ode.ODEOptions.model_validate({"noise_level": 0.8})


def log_prob(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Mean log-density, written out."""
    terms = -((x - mean) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))
    return terms.flatten(2).mean(2)


def test_the_log_ratio_of_262144_elements_keeps_what_a_difference_of_log_probs_loses() -> None:
    size = (2, 3, 64, 64, 64)  # 262,144 elements a step: the paper's
    std = torch.tensor([0.8, 0.4, 0.1]).reshape(1, 3, 1, 1, 1)
    old_mean = normals(*size, seed=1)
    x_next = old_mean + std * normals(*size, seed=2)
    mean = old_mean + 5e-4 * std * normals(*size, seed=3)
    exact = log_prob(x_next.double(), mean.double(), std.double()) - log_prob(
        x_next.double(), old_mean.double(), std.double()
    )
    ours = GaussianTransition(mean, std).log_ratio(x_next, old_mean)
    naive = log_prob(x_next, mean, std) - log_prob(x_next, old_mean, std)
    assert ours.dtype == torch.float32
    assert ours.shape == (2, 3)
    assert (ours - exact).abs().max() < 1e-9
    assert (naive - exact).abs().max() > 1e-8


def test_the_log_ratio_is_that_of_the_normal_distribution() -> None:
    mean, old, x = (normals(2, 3, 5, seed=seed).double() for seed in (1, 2, 3))
    std = torch.tensor([[0.5, 1.0, 2.0]] * 2).double()[..., None]
    new, before = (torch.distributions.Normal(mu, std.expand_as(x)) for mu in (mean, old))
    expected = (new.log_prob(x) - before.log_prob(x)).mean(2)
    ours = GaussianTransition(mean, std).log_ratio(x, old)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
    assert not GaussianTransition(mean, std).log_ratio(x, mean).any()


@pytest.mark.parametrize(
    ("scheduler", "noise_level", "part"),
    [(SDE, 0.8, "mean"), (SDE, 0.8, "log_ratio"), (SDE, 0.0, "mean"), (ODE, 0.0, "mean")],
)
def test_gradients_of_a_transition(
    scheduler: flow_sde.FlowSDE | ode.ODE, noise_level: float, part: str
) -> None:
    """By velocity and latents; at the first step, in the middle, and at the last."""
    times = scheduler.times(3, 3.0)
    t, t_next = times[None, :-1], times[None, 1:]
    noise = torch.full_like(t, noise_level)
    v, x, x_next, old_mean = (normals(1, 3, 2, 2, seed=seed).double() for seed in (1, 2, 3, 4))

    def value(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        step = scheduler.transition(v, x, t, t_next, noise)
        return step.mean if part == "mean" else step.log_ratio(x_next, old_mean)

    assert torch.autograd.gradcheck(value, (v.requires_grad_(), x.requires_grad_()))
