"""Latent KL: the exact divergence of one denoising step from an anchor's.

Paper
    Flow-GRPO (arXiv 2505.05470); UniGRPO (arXiv 2603.23500), the KL of Eq 6 and of Fig 5 (ii).

Mathematics
    KL(N(mu, std^2 I) || N(mu_anchor, std^2 I)) / d = mean((mu - mu_anchor)^2) / (2 std^2)
    over the d latent elements, std = sigma_t sqrt(dt).

Convention
    Reduced by a mean, like the log-ratio of the objective; exactly 0 at the anchor. It needs
    stochastic steps (std > 0).

Deviations and readings
    1. The code of Flow-GRPO divides by 2 sigma_t^2, without dt: that is dt = t - t_next times this,
       and is form = "without_dt". A weight taken from there belongs to that form.
    2. UniGRPO's weight for Fig 5 is not given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from unigrpo_core.interfaces import FlowRegularizer
from unigrpo_core.plugin import Field, Options, Provider
from unigrpo_core.records import FlowStep

if TYPE_CHECKING:
    from torch import Tensor


class LatentKLOptions(Options):
    """Weight, anchor and place belong to the recipe's slot."""

    form: Literal["exact", "without_dt"] = Field(
        "exact",
        description='"exact", or "without_dt": dt times that, as in the code of Flow-GRPO',
    )


def exact(step: FlowStep) -> Tensor:
    """[B, K]."""
    gap = step.transition.mean - step.transition_anchor.mean
    return (gap.square() / (2 * step.transition.std.square())).flatten(2).mean(2)


def without_dt(step: FlowStep) -> Tensor:
    """[B, K]."""
    return exact(step) * (step.t - step.t_next)


def build(options: LatentKLOptions) -> FlowRegularizer:
    return exact if options.form == "exact" else without_dt


PROVIDER = Provider(
    name="latent_kl",
    options=LatentKLOptions,
    build=build,
    summary="Gaussian KL of a step from the anchor's, exact or without dt",
    needs=("transition_anchor", "std"),
    cite="Flow-GRPO arXiv 2505.05470; UniGRPO arXiv 2603.23500 Eq 6",
)
