"""Velocity MSE: the squared distance of the velocity from an anchor's.

Paper
    UniGRPO (arXiv 2603.23500), Eq 8, the second of its two changes; weight 1.5e-5.

Mathematics
    mean over latent elements of (v - v_anchor)^2. It is the latent KL without its factor
    dt / 2 (sigma_t (1 - t) / (2 t) + 1 / sigma_t)^2, which is small where the noise is large.

Convention
    At the trained points of the trajectory; exactly 0 at the anchor.

Deviations and readings
    1. Eq 8 writes ||.||^2 and leaves its reduction open; a mean here, as in public
       re-implementations, so a weight meant for the sum is to be multiplied by the element count.
    2. The paper does not say at which steps; here where the objective trains.
    3. Its anchor is the "pre-trained reference model"; here the recipe's slot chooses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unigrpo_core.interfaces import FlowRegularizer
from unigrpo_core.plugin import Options, Provider
from unigrpo_core.records import FlowStep

if TYPE_CHECKING:
    from torch import Tensor


class VelocityMSEOptions(Options):
    """There is nothing to choose; weight, anchor and place belong to the recipe's slot."""


def penalty(step: FlowStep) -> Tensor:
    """[B, K]."""
    return (step.v - step.v_anchor).square().flatten(2).mean(2)


def build(options: VelocityMSEOptions) -> FlowRegularizer:
    return penalty


PROVIDER = Provider(
    name="velocity_mse",
    options=VelocityMSEOptions,
    build=build,
    summary="mean squared distance from the anchor's velocity, the same at every noise level",
    needs=("v_anchor",),
    cite="UniGRPO arXiv 2603.23500 Eq 8",
)
