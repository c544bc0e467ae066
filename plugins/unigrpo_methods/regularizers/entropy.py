"""Entropy: a bonus on the uncertainty of the text policy, estimated at the sampled tokens.

Paper
    Williams and Peng, Function optimization using connectionist reinforcement learning algorithms,
    1991; A3C (arXiv 1602.01783), section 4. UniGRPO has none.

Mathematics
    The entropy of a token's distribution is H = -E[log p], and its gradient is
    grad H = -E[log p grad log p], because E[grad log p] = 0. So for a sampled token the value is
    log p and its gradient log p grad log p, that is stopgrad(log p) (1 + log p - stopgrad(log p)):
    estimates of -H and of -grad H. Minimising them raises the entropy.

Convention
    The value is minus the entropy in nats per token, <= 0, so ``text/entropy`` shows -H and rises
    towards 0 as the policy narrows. A weight > 0 in the recipe's slot asks for more entropy.
    Padded tokens have value and gradient 0. It reads no anchor.

Deviations and readings
    1. The usual bonus sums over the whole vocabulary; here the sampled tokens are all there is. The
       mean is the same, the variance is not: use it with many tokens per update.
    2. The entropy is each token's, given what was written before it; that an earlier token leads to
       places of more or less entropy is left out, as in the usual bonus.
    3. Tokens come from the policy at sampling. From the second update of a rollout on value and
       gradient are biased, for the expectations above are over the current policy; no importance
       weight is applied. It is the entropy at the sampling temperature.
    4. It is the mean over the objective's weights: per token with a token mean, per sequence first
       with GRPO's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unigrpo_core.interfaces import TokenRegularizer
from unigrpo_core.plugin import Options, Provider
from unigrpo_core.records import TokenStep

if TYPE_CHECKING:
    from torch import Tensor


class EntropyOptions(Options):
    """There is nothing to choose; the weight belongs to the recipe's slot."""


def bonus(step: TokenStep) -> Tensor:
    """[B, L]."""
    logps = step.logps.masked_fill(~step.mask, 0)
    held = logps.detach()
    return held * (1 + logps - held)


def build(options: EntropyOptions) -> TokenRegularizer:
    return bonus


PROVIDER = Provider(
    name="entropy",
    options=EntropyOptions,
    build=build,
    summary="entropy bonus on the sampled tokens; its value is minus the entropy, in nats",
    cite="A3C arXiv 1602.01783 section 4",
    kind="bonus",
)
