"""Guidance with one fault each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kit_faults import Counted, Fault, Faults, drawing, provider
from unigrpo_core import testing
from unigrpo_core.interfaces import Guidance
from unigrpo_core.plugin import Field, Options


class GoodGuidance(Guidance):
    branches = ("text",)
    scale = 2.0

    def active(self, t):
        return (t > 0.3) & torch.tensor(self.scale != 1)

    def combine(self, v, branches, t):
        active = self.active(t).reshape(t.shape + (1,) * (v.dim() - 2))
        other = branches["text"]
        return torch.where(active, other + self.scale * (v - other), v)


def combined(change: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, v, branches, t: change(GoodGuidance.combine(self, v, branches, t), v)


guidance = Faults(testing.GuidanceConformance, GoodGuidance)
guidance("test_branches_are_names", "no tuple", branches="text")
guidance("test_branches_are_names", "named twice", branches=("text", "text"))
guidance("test_active_is_bool_of_the_times", "float32", active=lambda self, t: (t > 0.3).float())
guidance(
    "test_active_is_bool_of_the_times", r"\(\), expected", active=lambda self, t: (t > 2).any()
)
guidance(
    "test_active_is_bool_of_the_times", "other times", active=lambda self, t: t >= t.mean() + 0.01
)
guidance("test_active_is_bool_of_the_times", "no branch", branches=())
guidance(
    "test_combined_is_float32_of_the_velocities_shape",
    "float64",
    combine=combined(lambda found, v: found.double()),
)
guidance(
    "test_combined_is_float32_of_the_velocities_shape",
    r"\(2, 21\), expected",
    combine=combined(lambda found, v: found.flatten(2).mean(2)),
)
guidance(
    "test_inactive_leaves_the_velocity_alone",
    "where it is not active",
    combine=lambda self, v, branches, t: branches["text"] + 2 * (v - branches["text"]),
)
guidance(
    "test_inactive_leaves_the_velocity_alone",
    "where it is not active",
    combine=combined(lambda found, v: found * (1 + 1e-7)),
)
guidance("test_it_reads_its_branches_and_no_others", "reads 'text'", branches=("image",))
guidance("test_it_reads_its_branches_and_no_others", r"\['image'\]", branches=("text", "image"))
guidance("test_active_guidance_guides", "changes nothing", combine=combined(lambda found, v: v))
guidance(
    "test_points_are_independent",
    "another's",
    combine=combined(lambda found, v: found * found.mean()),
)
guidance(
    "test_gradient_reaches_the_conditional_velocity",
    "no gradient",
    combine=combined(lambda found, v: found.detach()),
)
guidance("test_nothing_is_drawn_or_changed", "of random;", active=drawing(GoodGuidance.active))
guidance(
    "test_nothing_is_drawn_or_changed", "input: v", combine=combined(lambda found, v: v.mul_(2))
)


class Scale(Options):
    scale: float = Field(2.0, description="guidance scale, any number")


class Offset(GoodGuidance):
    """Scale 0 is no guidance, as in diffusers' older pipelines."""

    def __init__(self, scale: float) -> None:
        self.scale = scale + 1


guidance.found.append(
    Fault(
        testing.GuidanceConformance,
        "test_scale_one_is_the_conditional_velocity",
        "not close",
        provider(lambda options: Offset(options.scale), options=Scale),
    )
)
guidance("test_branches_are_names", "", branches=("",))
guidance(
    "test_combined_is_float32_of_the_velocities_shape",
    "not finite",
    combine=combined(lambda found, v: found / 0),
)
guidance(
    "test_gradient_reaches_the_conditional_velocity",
    "0 everywhere",
    combine=combined(lambda found, v: found.detach() + 0 * v),
)
guidance(
    "test_gradient_reaches_the_conditional_velocity",
    "not finite",
    combine=combined(lambda found, v: found * (v - v.detach()).sqrt()),
)


def unsteadily(calls: Counted) -> Callable[..., Any]:
    return combined(lambda found, v: found * calls())


guidance("test_nothing_is_drawn_or_changed", "asked again", combine=unsteadily(Counted()))
