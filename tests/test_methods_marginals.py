"""Marginals of the stochastic samplers, where the exact velocity is known: Gaussian data.

Data are N(DATA_MEAN, DATA_STD^2), so x_t is Gaussian too, and the velocity, the expectation of
noise - data given x_t, is linear in x_t. A step then maps a Gaussian to a Gaussian, whose mean and
variance follow from the transition without sampling anything.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from unigrpo_methods.schedulers import cps, dance_sde, flow_sde

from unigrpo_core.interfaces import Scheduler

SDE = flow_sde.build(flow_sde.FlowSDEOptions())
DANCE = dance_sde.build(dance_sde.DanceSDEOptions())
CPS = cps.build(cps.CPSOptions())
DATA_MEAN, DATA_STD = 0.5, 0.4
MANY = 25_600


def variance(t: Tensor, data_std: float = DATA_STD) -> Tensor:
    """Of x_t = (1 - t) data + t noise."""
    return (1 - t) ** 2 * data_std**2 + t**2


def velocity(x: Tensor, t: Tensor, data_std: float = DATA_STD) -> Tensor:
    """E[noise - data | x_t = x]: the regression line of two jointly Gaussian variables."""
    slope = (t - (1 - t) * data_std**2) / variance(t, data_std)
    return slope * (x - (1 - t) * DATA_MEAN) - DATA_MEAN


class Path:
    """Mean and std of x after every step from pure noise, beside the true ones; float64 [T]."""

    def __init__(
        self,
        steps: int,
        noise_level: float,
        shift: float = 1.0,
        scheduler: Scheduler = SDE,
        data_std: float = DATA_STD,
    ) -> None:
        times = scheduler.times(steps, shift)
        t, t_next = times[:-1].expand(2, -1), times[1:].expand(2, -1)
        noise = torch.full_like(t, noise_level)
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, steps)
        v = velocity(x, t, data_std)[..., None]
        step = scheduler.transition(v, x[..., None], t, t_next, noise)
        at_0, at_1 = step.mean[..., 0].tolist()
        mean, var, found = 0.0, 1.0, []
        for low, high, std in zip(at_0, at_1, step.std[0, :, 0].tolist(), strict=True):
            mean, var = low + (high - low) * mean, (high - low) ** 2 * var + std**2
            found.append((mean, var))
        self.t = times[1:].numpy()
        self.mean, found_variance = np.array(found).T
        self.std = np.sqrt(found_variance)
        self.true_mean = (1 - self.t) * DATA_MEAN
        true = variance(times[1:], data_std).numpy()
        self.true_std = np.sqrt(true)
        self.excess = found_variance / true - 1  # of the variance

    def away(self, *, up_to: float = 1.0) -> float:
        """The largest |std / true std - 1| at times t <= ``up_to``."""
        return float(np.abs(self.std / self.true_std - 1)[self.t <= up_to].max())


@pytest.mark.parametrize("noise_level", [0.0, 0.8, 1.2])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_final_marginals_std_converges_to_that_of_the_data(
    noise_level: float, shift: float
) -> None:
    few, more, many = (
        Path(steps, noise_level, shift).std[-1] / DATA_STD - 1 for steps in (8, 400, MANY)
    )
    assert abs(many) < 4e-4
    assert abs(more) < 0.02
    assert abs(few) > 50 * abs(many)


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.8, 1.2])
def test_means_are_exact_whatever_the_steps(noise_level: float) -> None:
    """The score is 0 at the mean, whose path is straight."""
    for steps in (1, 7, 100):
        path = Path(steps, noise_level, shift=3.0)
        np.testing.assert_allclose(path.mean, path.true_mean, atol=1e-14)


@pytest.mark.parametrize(
    ("noise_level", "rate"), [(0.0, 1.0), (0.5, 0.25), (0.8, 0.64), (1.2, 1.0), (1.5, 1.0)]
)
def test_intermediate_marginals_from_t_9_down_converge_at_the_documented_rate(
    noise_level: float, rate: float
) -> None:
    """As T^-min(a^2, 1), and as 1 / T without noise."""
    steps = (MANY // 16, MANY // 4, MANY)
    far = [Path(count, noise_level).away(up_to=0.9) for count in steps]
    assert far[2] < {0.5: 4e-3}.get(noise_level, 1.5e-3)
    for coarse, fine in pairwise(far):
        assert np.log(coarse / fine) / np.log(4) == pytest.approx(rate, abs=0.05)


@pytest.mark.parametrize("noise_level", [0.3, 0.8, 1.2])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_near_t_1_the_excess_stays_however_many_the_steps(noise_level: float, shift: float) -> None:
    """After the first steps, where sigma diverges, it depends on their number, and on T only by
    what vanishes as 1 / T."""
    square = noise_level**2
    expected = [square**2 / 4]
    for k in range(1, 12):
        expected.append((1 - square / (2 * k)) ** 2 * expected[-1] + square**2 / (2 * k) ** 2)
    for steps in (MANY // 16, MANY // 4, MANY):
        found = Path(steps, noise_level, shift).excess[:12]
        np.testing.assert_allclose(found, expected, rtol=80 / steps)


def test_the_excess_that_the_docstring_gives_for_the_papers_noise_level() -> None:
    first, second = Path(MANY, 0.8, shift=3.0).excess[:2]
    assert first == pytest.approx(0.10, abs=0.005)
    assert second == pytest.approx(0.15, abs=0.005)
    text = " ".join((flow_sde.__doc__ or "").split())
    assert "1 + a^4 / 4 (1.10 at a = .8)" in text
    assert "(1.15)" in text
    assert "T^-min(a^2, 1)" in text
    path = Path(25, 0.8, shift=3.0)
    assert path.excess[:5].max() == path.excess[1] > 0.15


@pytest.mark.parametrize("scheduler", [DANCE, CPS])
@pytest.mark.parametrize("noise_level", [0.3, 1.0])
def test_means_of_the_other_samplers_are_exact(scheduler: Scheduler, noise_level: float) -> None:
    for steps in (1, 7, 100):
        path = Path(steps, noise_level, 3.0, scheduler)
        np.testing.assert_allclose(path.mean, path.true_mean, atol=1e-14)


@pytest.mark.parametrize("noise_level", [0.3, 0.8, 1.2])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dance_sde_converges_to_all_marginals_as_1_over_steps(
    noise_level: float, shift: float
) -> None:
    coarse, fine = (
        Path(steps, noise_level, shift, DANCE).away() for steps in (MANY // 16, MANY // 4)
    )
    assert fine < 5e-4
    assert coarse / fine == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("noise_level", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 25])
def test_cps_keeps_every_marginal_of_data_that_are_a_point(noise_level: float, steps: int) -> None:
    path = Path(steps, noise_level, 3.0, CPS, data_std=1e-9)
    np.testing.assert_allclose(path.std[:-1], path.t[:-1], rtol=1e-13)
    assert path.std[-1] < 1e-8


@pytest.mark.parametrize("noise_level", [0.3, 0.8, 1.0])
def test_cps_is_too_narrow_for_other_data_by_the_documented_factor(noise_level: float) -> None:
    c = np.cos(noise_level * np.pi / 2)
    far, at_the_end = [], []
    for steps in (MANY // 16, MANY // 4, MANY):
        path = Path(steps, noise_level, 1.0, CPS)
        square = path.t**2 / path.true_std**2
        limit = (1 + c) / (2 - (1 - c) * square)
        off = np.abs(path.excess + 1 - limit)
        far.append(off[path.t > 0.3].max())
        at_the_end.append(off[-1])
    assert limit[-1] == (1 + c) / 2
    assert far[2] < 1e-3
    for found, rate in ((far, 1), (at_the_end, 2 / 3)):
        for coarse, fine in pairwise(found):
            assert np.log(coarse / fine) / np.log(4) == pytest.approx(rate, abs=0.05)
    assert "(.65 V at eta = .8)" in (cps.__doc__ or "")
    assert (1 + np.cos(0.4 * np.pi)) / 2 == pytest.approx(0.65, abs=0.005)


def test_samples_have_the_mean_and_std_computed_here() -> None:
    """What is above holds for numbers drawn step by step, in float32."""
    rows, steps = 200_000, 25
    path, times = Path(steps, 0.8, shift=3.0), SDE.times(steps, 3.0).float()
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, 1, 1, generator=generator)
    for k in range(steps):
        t, t_next = (times[i].expand(rows, 1) for i in (k, k + 1))
        v = velocity(x, t[..., None])
        step = SDE.transition(v, x, t, t_next, torch.full_like(t, 0.8))
        x = step.mean + step.std * torch.randn(x.shape, generator=generator)
        deviation = path.std[k] / np.sqrt(rows)
        assert x.mean().item() == pytest.approx(path.mean[k], abs=5 * deviation)
        assert x.std().item() == pytest.approx(path.std[k], abs=5 * deviation)
