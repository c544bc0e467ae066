"""Schedulers with one fault each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kit_faults import Counted, Faults, drawing, unsteady
from unigrpo_core import testing
from unigrpo_core.testing.samples import PlainScheduler, PlainTransition


class NaiveTransition(PlainTransition):
    """Subtracts two float32 log-probs."""

    def log_ratio(self, x_next, old_mean):
        return self.log_prob(x_next, self.mean) - self.log_prob(x_next, old_mean)

    def log_prob(self, x_next, mean):
        return torch.distributions.Normal(mean, self.std).log_prob(x_next).flatten(2).mean(2)


class LopsidedTransition(PlainTransition):
    """Forgets the square of the drift."""

    def log_ratio(self, x_next, old_mean):
        delta = self.mean - old_mean
        return (delta * (x_next - old_mean) / self.std.square()).flatten(2).mean(2)


class ShiftedTransition(PlainTransition):
    def log_ratio(self, x_next, old_mean):
        return super().log_ratio(x_next, old_mean) + 1e-9


def moved(**changes: Callable[..., Any]) -> Callable[..., Any]:
    """A transition whose mean or std is changed: ``mean=lambda mean, points: ...``."""

    def transition(self, v, x_t, t, t_next, noise_level):
        step = PlainScheduler.transition(self, v, x_t, t, t_next, noise_level)
        points = {"v": v, "x_t": x_t, "t": t, "noise": noise_level}
        mean = changes.get("mean", lambda mean, points: mean)(step.mean, points)
        return PlainTransition(mean, changes.get("std", lambda std, points: std)(step.std, points))

    return transition


def with_log_ratio(kind: type) -> Callable[..., Any]:
    def transition(self, *given):
        step = PlainScheduler.transition(self, *given)
        return kind(step.mean, step.std)

    return transition


def times(change: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, steps, shift: change(PlainScheduler.times(self, steps, shift))


scheduler = Faults(testing.SchedulerConformance, PlainScheduler)
scheduler("test_times_fall_from_one_to_zero", "float32", times=times(lambda t: t.float()))
scheduler("test_times_fall_from_one_to_zero", "end at", times=times(lambda t: t.clamp(min=1e-3)))
scheduler("test_times_fall_from_one_to_zero", "begin at", times=times(lambda t: t * 0.999))
scheduler("test_times_fall_from_one_to_zero", "shape", times=times(lambda t: t[:-1]))
scheduler("test_times_fall_from_one_to_zero", "do not fall", times=times(torch.round))
scheduler(
    "test_shift_moves_times_towards_the_noise",
    "shift 3.0 against 1.0",
    times=lambda self, steps, shift: PlainScheduler.times(self, steps, 1.0),
)
scheduler(
    "test_moments_are_float32_of_the_latents_shape",
    "for torch.bfloat16",
    transition=moved(mean=lambda mean, points: mean.to(points["v"].dtype)),
)
scheduler(
    "test_moments_are_float32_of_the_latents_shape",
    r"std \(2, 7\)",
    transition=moved(std=lambda std, points: std.flatten(1)),
)
scheduler(
    "test_moments_are_float32_of_the_latents_shape",
    "the std is not finite",
    transition=moved(std=lambda std, points: std / (1 - points["t"].reshape(std.shape))),
)
scheduler(
    "test_without_noise_it_is_the_euler_step",
    "std at noise level 0",
    transition=moved(std=lambda std, points: std + 1e-6),
)
scheduler(
    "test_without_noise_it_is_the_euler_step",
    "not close",
    transition=moved(mean=lambda mean, points: 2 * points["x_t"] - mean),
)
scheduler(
    "test_stochastic_is_true",
    "stochastic, and std",
    transition=moved(std=lambda std, points: 0 * std),
)
scheduler("test_stochastic_is_true", "std is above 0", stochastic=False)
scheduler(
    "test_rows_are_independent",
    "another row changes the mean",
    transition=moved(mean=lambda mean, points: mean - 1e-3 * mean.mean()),
)
scheduler(
    "test_rows_are_independent",
    "another row changes the std",
    transition=moved(std=lambda std, points: std * points["noise"].mean()),
)
scheduler(
    "test_gradient_reaches_the_velocity",
    "carries no gradient",
    transition=moved(mean=lambda mean, points: mean.detach()),
)
scheduler(
    "test_gradient_reaches_the_velocity",
    "other points",
    transition=moved(mean=lambda mean, points: mean + 0.1 * mean.mean()),
)
scheduler(
    "test_nothing_is_drawn_or_changed",
    "of random;",
    transition=drawing(PlainScheduler.transition),
)
scheduler(
    "test_nothing_is_drawn_or_changed",
    "input: x_t",
    transition=moved(mean=lambda mean, points: (mean, points["x_t"].zero_())[0]),
)
scheduler(
    "test_log_ratio_is_zero_at_the_old_mean",
    "at the old mean",
    transition=with_log_ratio(ShiftedTransition),
)
scheduler(
    "test_log_ratio_is_antisymmetric",
    "not close",
    transition=with_log_ratio(LopsidedTransition),
)
scheduler(
    "test_log_ratio_is_that_of_the_density",
    "not close",
    transition=with_log_ratio(NaiveTransition),
)
scheduler("test_stochastic_is_true", "", stochastic=1)
scheduler(
    "test_gradient_reaches_the_velocity",
    "no gradient reaches v",
    transition=moved(mean=lambda mean, points: mean.detach() + 0 * points["v"]),
)
scheduler("test_nothing_is_drawn_or_changed", "times differ", times=unsteady(PlainScheduler.times))


def unsteadily(name: str, calls: Counted) -> Callable[..., Any]:
    return moved(**{name: lambda value, points: value * (1 + calls() / 1000)})


for name in ("mean", "std"):
    scheduler(
        "test_nothing_is_drawn_or_changed",
        f"{name} differs",
        transition=unsteadily(name, Counted()),
    )
scheduler(
    "test_moments_are_float32_of_the_latents_shape",
    "no Transition",
    transition=lambda self, *given: PlainScheduler.transition(self, *given).mean,
)
scheduler(
    "test_moments_are_float32_of_the_latents_shape",
    r"mean \(2, 7, 1\)",
    transition=moved(mean=lambda mean, points: mean.flatten(2).mean(2, keepdim=True)),
)


class PerRow(PlainTransition):
    def log_ratio(self, x_next, old_mean):
        return super().log_ratio(x_next, old_mean).sum(1)


class InDouble(PlainTransition):
    def log_ratio(self, x_next, old_mean):
        return super().log_ratio(x_next, old_mean).double()


scheduler("test_log_ratio_is_zero_at_the_old_mean", r"\(2,\)", transition=with_log_ratio(PerRow))
scheduler("test_log_ratio_is_zero_at_the_old_mean", "float64", transition=with_log_ratio(InDouble))
scheduler("test_unit_shift_is_that_of_the_unit", "unit is 'bits'", unit="bits")


class Unscaled(PlainTransition):
    unit_shift = property(lambda self: 2 * self.std)


scheduler("test_unit_shift_is_that_of_the_unit", "", transition=with_log_ratio(Unscaled))
scheduler("test_log_ratio_is_that_of_the_density", "", unit="latent^2")
