"""GRPO on the tokens of the reasoning.

Paper
    UniGRPO (arXiv 2603.23500), Eq 2; GRPO (DeepSeekMath, arXiv 2402.03300).

Mathematics
    r = pi(y_k | ...) / pi_old(y_k | ...),   J = 1/G sum_i 1/|y_i| sum_k min(r A_i, clip(r, 1 - c,
    1 + c) A_i). Values are -min(...), weights mask / |y|, so their weighted mean is -J.

Convention
    |y| counts every sampled token, the end-of-sequence token included. Padded tokens have value,
    metrics and weight 0.

Deviations and readings
    1. Neither paper gives a clip range for text; 0.2 is PPO's, and TRL's default for GRPO.
    2. The term -beta_txt KL of Eq 2 is the regularizer ``text_kl``; the paper sets beta_txt = 0.
    3. The log-ratio is limited to +-20 (see ``surrogate``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from unigrpo_core.interfaces import TextObjective
from unigrpo_core.plugin import Field, Options, Provider
from unigrpo_methods.objectives.surrogate import clipped_surrogate

if TYPE_CHECKING:
    from torch import Tensor


class GRPOOptions(Options):
    clip_range: float = Field(
        0.2, gt=0, description="bound c on |ratio - 1| of a token, > 0 (no unit)"
    )


@dataclass(frozen=True)
class GRPO(TextObjective):
    """Per-token clipped surrogate, averaged over tokens, then over sequences."""

    options: GRPOOptions
    clips = "a token's ratio"

    def loss(
        self, logps: Tensor, old_logps: Tensor, mask: Tensor, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = (logps - old_logps).masked_fill(~mask, 0)
        return clipped_surrogate(log_ratio, advantages[:, None] * mask, self.options.clip_range)

    def weights(self, mask: Tensor) -> Tensor:
        return mask.float() / mask.sum(1, keepdim=True).clamp(min=1)


def build(options: GRPOOptions) -> GRPO:
    return GRPO(options)


PROVIDER = Provider(
    name="grpo",
    options=GRPOOptions,
    build=build,
    summary="token-wise clipped policy gradient, mean over tokens then sequences",
    cite="UniGRPO arXiv 2603.23500 Eq 2; GRPO arXiv 2402.03300",
)
