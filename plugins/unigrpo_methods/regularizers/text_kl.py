"""Text KL: an estimate of the divergence of the text policy from an anchor.

Paper
    GRPO (DeepSeekMath, arXiv 2402.03300); UniGRPO (arXiv 2603.23500), the KL of Eq 2, whose
    weight beta_txt is 0 there. The estimator is Schulman's k3.

Mathematics
    k3 = exp(d) - d - 1, d = log p_anchor(token) - log p(token). For tokens drawn from the policy
    its expectation is KL(policy || anchor); the expectation of its gradient is the gradient of
    KL(anchor || policy).

Convention
    Per token, through expm1: near the anchor exp(d) - 1 would leave no digits. >= 0, exactly 0 at
    the anchor and at padded tokens. d > 88 overflows to infinity, which is no number to train on.

Deviations and readings
    1. Tokens come from the policy at sampling, so from the second update of a rollout on the
       estimate is slightly off-policy; no importance weight is applied, as in GRPO.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unigrpo_core.interfaces import TokenRegularizer
from unigrpo_core.plugin import Options, Provider
from unigrpo_core.records import TokenStep

if TYPE_CHECKING:
    from torch import Tensor


class TextKLOptions(Options):
    """There is nothing to choose; weight and anchor belong to the recipe's slot."""


def penalty(step: TokenStep) -> Tensor:
    """[B, L]."""
    gap = (step.logps_anchor - step.logps).masked_fill(~step.mask, 0)
    return (gap.expm1() - gap).clamp(min=0)  # rounding alone can make it negative


def build(options: TextKLOptions) -> TokenRegularizer:
    return penalty


PROVIDER = Provider(
    name="text_kl",
    options=TextKLOptions,
    build=build,
    summary="k3 estimate of the KL from the anchor, per token",
    needs=("logps_anchor",),
    cite="GRPO arXiv 2402.03300; UniGRPO arXiv 2603.23500 Eq 2",
)
