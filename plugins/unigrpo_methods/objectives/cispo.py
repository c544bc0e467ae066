"""CISPO on the tokens of the reasoning: the importance weight is clipped, no token's gradient is.

Paper
    CISPO (MiniMax-M1, arXiv 2506.13585), Eqs 4 and 5.

Mathematics
    J = 1/sum_i |y_i| sum_i sum_k stopgrad(min(r, 1 + h)) A_i log pi(y_k | ...).
    Values are -stopgrad(min(r, 1 + h)) A log pi, weights the mask. The gradient by a log-prob is
    -min(r, 1 + h) A. PPO's clip, by contrast, sets it to 0 beyond its range; at r = 1 both have -A.

Convention
    The log-ratio is held below log(1 + h) before exp, which nothing can overflow. Values are no
    estimate of J: their differences do not give the gradient, and ``text/loss`` moves with the
    log-probs themselves. ``clip_fraction`` counts the tokens whose weight was held, whose gradient
    goes on; ``ratio_deviation`` is |r - 1| before that.

Deviations and readings
    1. Eq 5 clips below too, at 1 - l; the paper takes an l so large that it never acts, and so
       there is none here.
    2. The paper gives no h. The default, 4, holds weights below 5, as TRL's documentation suggests
       after ScaleRL (arXiv 2510.13786). There ``epsilon_high`` is the bound 1 + h itself.
    3. The mean is over all tokens of the update, as in TRL; the paper's is over a prompt's group.
    4. The paper's dynamic sampling and length penalty, taken from DAPO, are not part of a loss.
    5. In ``ratio_deviation`` the log-ratio is limited to +-20 (see ``surrogate``).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log1p
from typing import TYPE_CHECKING

from unigrpo_core.interfaces import TextObjective
from unigrpo_core.plugin import Field, Options, Provider
from unigrpo_methods.objectives.surrogate import LOG_RATIO_LIMIT

if TYPE_CHECKING:
    from torch import Tensor


class CISPOOptions(Options):
    clip_high: float = Field(
        4.0, gt=0, description="a token's weight, its ratio, is held below 1 + clip_high, > 0"
    )


@dataclass(frozen=True)
class CISPO(TextObjective):
    """REINFORCE with clipped importance weights, averaged over all tokens."""

    options: CISPOOptions
    clips = "a token's weight"

    def loss(
        self, logps: Tensor, old_logps: Tensor, mask: Tensor, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logps = logps.masked_fill(~mask, 0)
        log_ratio = (logps - old_logps).masked_fill(~mask, 0).detach()
        bound = log1p(self.options.clip_high)
        values = -log_ratio.clamp(max=bound).exp() * advantages[:, None] * logps
        return values, {
            "clip_fraction": (log_ratio > bound).to(values.dtype),
            "ratio_deviation": log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).expm1().abs(),
        }

    def weights(self, mask: Tensor) -> Tensor:
        return mask.float()


def build(options: CISPOOptions) -> CISPO:
    return CISPO(options)


PROVIDER = Provider(
    name="cispo",
    options=CISPOOptions,
    build=build,
    summary="policy gradient with clipped importance weights; no token's gradient stops",
    cite="CISPO arXiv 2506.13585 Eqs 4-5",
)
