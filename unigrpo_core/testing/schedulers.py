"""What every scheduler keeps: see ``Scheduler`` in :mod:`unigrpo_core.interfaces`, and
``Transition`` in :mod:`unigrpo_core.records`."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, get_args

import pytest
import torch
from torch import Tensor

from unigrpo_core.interfaces import Scheduler
from unigrpo_core.recipe.slots import SchedulerSlot
from unigrpo_core.records import Transition, Unit
from unigrpo_core.testing.base import LightConformance
from unigrpo_core.testing.samples import AXES, normal, wide
from unigrpo_core.testing.watch import no_global_draws, unchanged


class SchedulerConformance(LightConformance):
    """Checks of a scheduler.

    Facts:
        steps: numbers of steps to try.
        shifts: timestep shifts to try, rising.
        noise_level: a noise level as recipes state it, for the checks of stochastic steps.
    """

    slot = SchedulerSlot
    steps: ClassVar[tuple[int, ...]] = (1, 2, 7, 25)
    shifts: ClassVar[tuple[float, ...]] = (1.0, 3.0)
    noise_level: ClassVar[float] = 0.7

    def points(self, scheduler: Scheduler, noise_level: float, rows: int = 2) -> tuple[Tensor, ...]:
        """t, t_next and noise level [B, K] of all the steps of a grid of 7."""
        times = scheduler.times(7, 3.0).float()
        t, t_next = (part.expand(rows, 7).clone() for part in (times[:-1], times[1:]))
        return t, t_next, torch.full_like(t, noise_level)

    def level(self, scheduler: Scheduler) -> float:
        """The noise level that the scheduler takes."""
        return self.noise_level if scheduler.stochastic else 0.0

    def transition(self, scheduler: Scheduler, name: str = "v") -> Transition:
        """A transition at every step of the grid, by the velocities of that name."""
        v, x_t = normal(name, 2, 7, 5, 4), normal("x_t", 2, 7, 5, 4)
        return scheduler.transition(v, x_t, *self.points(scheduler, self.level(scheduler)))

    def stochastic(self, scheduler: Scheduler) -> None:
        if not scheduler.stochastic:
            pytest.skip("it is not stochastic, and says so")

    # --- times --------------------------------------------------------------------------------

    def test_times_fall_from_one_to_zero(self, component: Scheduler) -> None:
        """float64 [T + 1], strictly falling from exactly 1 to exactly 0, also as float32."""
        for steps in self.steps:
            for shift in self.shifts:
                times = component.times(steps, shift)
                said = f"times({steps}, {shift})"
                assert times.dtype == torch.float64, f"{said}: {times.dtype}"
                assert times.shape == (steps + 1,), f"{said}: shape {tuple(times.shape)}"
                assert times[0] == 1, f"{said} begin at {times[0].item()}"
                assert times[-1] == 0, f"{said} end at {times[-1].item()}"
                assert (times.float().diff() < 0).all(), f"{said} do not fall: {times.tolist()}"

    def test_shift_moves_times_towards_the_noise(self, component: Scheduler) -> None:
        """A larger shift makes every time between the ends larger."""
        for steps in self.steps:
            for less, more in pairwise(sorted(self.shifts)):
                small, large = component.times(steps, less), component.times(steps, more)
                moved = (large - small)[1:-1]
                assert (moved > 0).all(), f"{steps} steps, shift {more} against {less}: {moved}"

    # --- moments ------------------------------------------------------------------------------

    def test_moments_are_float32_of_the_latents_shape(self, component: Scheduler) -> None:
        """The mean is float32 [B, K, *]; std is float32 of as many axes, broadcasts over it and is
        finite, as the mean is, at every step of the grid."""
        for axes in AXES:
            for dtype in (torch.float32, torch.bfloat16):
                v, x_t = normal("v", 2, 7, *axes).to(dtype), normal("x_t", 2, 7, *axes)
                points = self.points(component, self.level(component))
                step = component.transition(v, x_t, *points)
                assert isinstance(step, Transition), f"{type(step).__name__} is no Transition"
                assert step.mean.shape == x_t.shape, f"mean {tuple(step.mean.shape)}"
                assert step.std.dim() == x_t.dim(), f"std {tuple(step.std.shape)}"
                assert step.std.expand_as(x_t).shape == x_t.shape
                for name, value in (("mean", step.mean), ("std", step.std)):
                    assert value.dtype == torch.float32, f"{name} is {value.dtype} for {dtype}"
                    assert torch.isfinite(value).all(), f"the {name} is not finite"

    def test_without_noise_it_is_the_euler_step(self, component: Scheduler) -> None:
        """At noise level 0 the mean is x + v dt and std exactly 0."""
        v, x_t = normal("v", 2, 7, 5, 4), normal("x_t", 2, 7, 5, 4)
        t, t_next, noise = self.points(component, 0.0)
        step = component.transition(v, x_t, t, t_next, noise)
        assert not step.std.any(), f"std at noise level 0: {step.std.flatten().tolist()}"
        euler = x_t.double() + v.double() * wide((t_next - t).double(), v)
        torch.testing.assert_close(step.mean.double(), euler, atol=1e-6, rtol=1e-6)

    def test_stochastic_is_true(self, component: Scheduler) -> None:
        """If ``stochastic`` std is above 0 at every step (0 at the last one, if ``last_step`` is
        False); else it is 0, or noise is refused."""
        assert isinstance(component.stochastic, bool)
        v, x_t = normal("v", 2, 7, 5, 4), normal("x_t", 2, 7, 5, 4)
        points = self.points(component, self.noise_level)
        if component.stochastic:
            std = component.transition(v, x_t, *points).std
            inner, last = std[:, :-1], std[:, -1]
            assert (inner > 0).all(), f"stochastic, and std is {std.flatten().tolist()}"
            assert bool((last > 0).all()) == component.last_step, f"std of the last step: {last}"
            assert self.noise_level <= component.most_noise, f"takes up to {component.most_noise}"
            return
        try:
            std = component.transition(v, x_t, *points).std
        except ValueError:
            return
        assert not std.any(), "stochastic is False, and std is above 0"

    def test_rows_are_independent(self, component: Scheduler) -> None:
        """A point's moments are the same whatever else is in the batch, also its noise level."""
        v, x_t = normal("v", 2, 7, 5, 4), normal("x_t", 2, 7, 5, 4)
        t, t_next, noise = self.points(component, self.level(component))
        before = component.transition(v, x_t, t, t_next, noise)
        v, x_t, noise = v.clone(), x_t.clone(), noise.clone()
        v[1], x_t[1], noise[1] = v[1] + 2.0, x_t[1] * 3.0, 0.0
        after = component.transition(v, x_t, t, t_next, noise)
        alone = component.transition(v[:1], x_t[:1], t[:1], t_next[:1], noise[:1])
        for name in ("mean", "std"):
            one = getattr(before, name)[0]
            assert torch.equal(getattr(after, name)[0], one), f"another row changes the {name}"
            torch.testing.assert_close(getattr(alone, name)[0], one, atol=1e-6, rtol=1e-6)

    def test_gradient_reaches_the_velocity(self, component: Scheduler) -> None:
        """The mean carries gradient to v, each point's to its own."""
        v, x_t = normal("v", 2, 7, 5, 4).requires_grad_(), normal("x_t", 2, 7, 5, 4)
        step = component.transition(v, x_t, *self.points(component, self.level(component)))
        assert step.mean.requires_grad, "the mean carries no gradient"
        (gradient,) = torch.autograd.grad(step.mean[0, 1].sum(), v)
        assert gradient[0, 1].all(), "no gradient reaches v"
        gradient[0, 1] = 0
        assert not gradient.any(), "gradient reaches the velocities of other points"

    def test_nothing_is_drawn_or_changed(self, component: Scheduler) -> None:
        """Times and moments are functions: no global draw, no input changed, alike when asked
        again."""
        v, x_t = normal("v", 2, 7, 5, 4), normal("x_t", 2, 7, 5, 4)
        points = self.points(component, self.level(component))
        with no_global_draws(), unchanged(v=v, x_t=x_t, points=points):
            first, again = (component.transition(v, x_t, *points) for _ in range(2))
            times = [component.times(7, 3.0) for _ in range(2)]
        assert torch.equal(*times), "times differ when asked again"
        assert torch.equal(first.mean, again.mean), "the mean differs when asked again"
        assert torch.equal(first.std, again.std), "std differs when asked again"

    # --- log-ratios ---------------------------------------------------------------------------

    def test_log_ratio_is_zero_at_the_old_mean(self, component: Scheduler) -> None:
        """Exactly 0 where nothing has moved, float32 [B, K]."""
        self.stochastic(component)
        step = self.transition(component)
        found = step.log_ratio(normal("x_next", 2, 7, 5, 4), step.mean)
        assert found.shape == (2, 7), f"{tuple(found.shape)}, expected [B, K] = (2, 7)"
        assert found.dtype == torch.float32, f"{found.dtype}"
        assert not found.any(), f"at the old mean: {found.flatten().tolist()}"

    def test_log_ratio_is_antisymmetric(self, component: Scheduler) -> None:
        """Old and new in each other's place turn its sign."""
        self.stochastic(component)
        one, two = self.transition(component), self.transition(component, "another v")
        x_next = one.mean + one.std * normal("noise", 2, 7, 5, 4)
        there, back = one.log_ratio(x_next, two.mean), two.log_ratio(x_next, one.mean)
        torch.testing.assert_close(there, -back, atol=1e-6, rtol=1e-5)

    def test_log_ratio_is_that_of_the_density(self, component: Scheduler) -> None:
        """The mean over elements of the two Gaussian log-densities' difference (of the squared
        distances', if ``unit`` says so), to more digits than float32 log-densities would leave of
        it."""
        self.stochastic(component)
        shape = (1, 7, 64, 64)
        v, x_t = normal("v", *shape), normal("x_t", *shape)
        points = self.points(component, self.noise_level, rows=1)
        old = component.transition(v, x_t, *points)
        new = component.transition(v + 1e-3 * normal("drift", *shape), x_t, *points)
        x_next = old.mean + old.std * normal("noise", *shape)
        gap = [(x_next.double() - step.mean.double()).square() for step in (old, new)]
        scale = 2 * new.std.double().square() if component.unit == "nats" else 1.0
        exact = ((gap[0] - gap[1]) / scale).flatten(2).mean(2)
        found = new.log_ratio(x_next, old.mean)
        torch.testing.assert_close(found.double(), exact, atol=2e-9, rtol=1e-4)

    def test_unit_shift_is_that_of_the_unit(self, component: Scheduler) -> None:
        """``unit`` is "nats" or "latent^2", and ``unit_shift`` std or 1 / (2 std)."""
        self.stochastic(component)
        assert component.unit in get_args(Unit), f"unit is {component.unit!r}"
        step = self.transition(component)
        exact = step.std if component.unit == "nats" else 1 / (2 * step.std)
        torch.testing.assert_close(step.unit_shift, exact, atol=0, rtol=1e-6)
