"""Regularizers with one fault each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kit_faults import Counted, Faults, drawing
from unigrpo_core import testing


def mse(step):
    return (step.v - step.v_anchor).square().flatten(2).mean(2)


flow = Faults(testing.FlowRegularizerConformance, lambda: mse, needs=("v_anchor",))


def per_batch(step):
    return mse(step) / mse(step).detach().mean() if mse(step).any() else mse(step)


def overwriting(step):
    value = mse(step)
    step.x_t.zero_()
    return value


def sometimes(calls: Counted) -> Callable[..., Any]:
    return lambda step: mse(step) * calls()


def detached(step):
    gap = step.v - step.v_anchor
    return (gap.detach().abs() * gap).flatten(2).mean(2)


flow("test_needs_are_fields_of_a_step", "'moon'", facts={"needs": ("moon",)})
flow("test_it_reads_what_it_needs_and_no_more", "reads 'v_anchor'", facts={})
flow(
    "test_it_reads_what_it_needs_and_no_more",
    "'transition_anchor'.*never reads",
    lambda: mse,
    facts={"needs": ("v_anchor", "transition_anchor")},
)
flow("test_nothing_global_is_drawn", "of random;", lambda: drawing(mse))
flow("test_inputs_are_left_alone", "input: step", lambda: overwriting)
flow("test_values_are_repeatable", "", lambda: sometimes(Counted()))
flow("test_zero_at_the_anchor", "at the anchor", lambda: lambda step: mse(step) + 1e-9)
flow(
    "test_never_negative",
    "at a gap of 1e-06",
    lambda: lambda step: mse(step) - 1e-9 * (step.v != step.v_anchor).flatten(2).any(2),
)
flow(
    "test_never_negative",
    "0 everywhere",
    lambda: lambda step: 0 * mse(step),
)
flow(
    "test_gradient_reaches_the_current_values",
    "no gradient",
    lambda: lambda step: mse(step).detach(),
)
flow(
    "test_gradient_reaches_the_current_values",
    "0 everywhere",
    lambda: lambda step: 0 * mse(step),
)
flow(
    "test_gradient_at_the_anchor_is_finite",
    "not finite",
    lambda: lambda step: mse(step).sqrt(),
)
flow("test_gradient_is_that_of_the_values", "", lambda: detached)
flow(
    "test_values_are_one_float32_per_point",
    r"\(2, 3, 7\), expected",
    lambda: lambda step: (step.v - step.v_anchor).square(),
)
flow(
    "test_values_are_one_float32_per_point",
    "float64",
    lambda: lambda step: mse(step).double(),
)
flow("test_points_are_independent", "felt elsewhere", lambda: per_batch)
flow(
    "test_it_is_a_mean_over_latent_elements",
    "not close",
    lambda: lambda step: (step.v - step.v_anchor).square().flatten(2).sum(2),
)


def unsaid_kl(step):
    gap = step.transition.mean - step.transition_anchor.mean
    return (gap / step.transition.std).square().flatten(2).mean(2)


flow(
    "test_without_std_in_needs_it_takes_steps_without_noise",
    "std is 0",
    lambda: unsaid_kl,
    facts={"needs": ("transition_anchor",)},
)


def k3(step):
    gap = (step.logps_anchor - step.logps).masked_fill(~step.mask, 0)
    return (gap.expm1() - gap).clamp(min=0)


token = Faults(testing.TokenRegularizerConformance, lambda: k3, needs=("logps_anchor",))


def unmasked(step):
    return (step.logps_anchor - step.logps).square()


def masked_values_only(step):
    hidden = unmasked(step).masked_fill(~step.mask, 0).detach()
    return hidden + unmasked(step) - unmasked(step).detach()


token("test_values_are_one_float32_per_token", "expected", lambda: lambda s: k3(s).sum(1))
token("test_masked_tokens_are_zero", "masked:", lambda: unmasked)
token("test_masked_tokens_are_zero", "gradient reaches masked", lambda: masked_values_only)
token(
    "test_rows_are_independent", "felt elsewhere", lambda: lambda s: k3(s) * k3(s).detach().mean()
)
flow(
    "test_gradient_reaches_the_current_values",
    "not finite",
    lambda: lambda step: mse(step) * (step.v - step.v.detach()).flatten(2).sum(2).sqrt(),
)
flow(
    "test_never_negative",
    "not finite at a gap of 10",
    lambda: lambda step: (20 * mse(step)).exp() - 1,
)
flow(
    "test_values_are_one_float32_per_point",
    "not finite",
    lambda: lambda step: mse(step) / step.transition.std.new_zeros(2, 3),
)
token("test_values_are_one_float32_per_token", "float64", lambda: lambda s: k3(s).double())
token("test_values_are_one_float32_per_token", "not finite", lambda: lambda s: k3(s) / 0)
