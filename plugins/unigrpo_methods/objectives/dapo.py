"""DAPO on the tokens of the reasoning: a wider clip upwards, and a mean over all tokens.

Paper
    DAPO (arXiv 2503.14476), Eq 8: clip-higher and the token-level loss.

Mathematics
    r = pi(y_k | ...) / pi_old(y_k | ...),   J = 1/sum_i |y_i| sum_i sum_k min(r A_i,
    clip(r, 1 - l, 1 + h) A_i). Values are -min(...), weights the mask, so their weighted mean is
    -J: a token counts alike in a short sequence and in a long one. h > l leaves unlikely tokens,
    whose ratio grows fastest, more room to become likely.

Convention
    |y| counts every sampled token, the end-of-sequence token included. Padded tokens have value,
    metrics and weight 0. With h = l and sequences of one length the loss is GRPO's.

Deviations and readings
    1. Two of the paper's four techniques are not part of a loss and not here: overlong reward
       shaping, which belongs to a reward, and dynamic sampling, which belongs to the rollout.
    2. Eq 8 takes the mean over the tokens of a prompt's group, then over prompts; here it is over
       all tokens of the update, as in verl and TRL.
    3. The paper has no KL; ``text_kl`` would add one.
    4. The log-ratio is limited to +-20 (see ``surrogate``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from unigrpo_core.interfaces import TextObjective
from unigrpo_core.plugin import Field, Options, Provider
from unigrpo_methods.objectives.surrogate import clipped_surrogate

if TYPE_CHECKING:
    from torch import Tensor


class DAPOOptions(Options):
    clip_low: float = Field(
        0.2, gt=0, description="a token's ratio is held above 1 - clip_low, > 0 (no unit)"
    )
    clip_high: float = Field(
        0.28, gt=0, description="a token's ratio is held below 1 + clip_high, > 0 (no unit)"
    )


@dataclass(frozen=True)
class DAPO(TextObjective):
    """Per-token surrogate with two clip ranges, averaged over all tokens."""

    options: DAPOOptions
    clips = "a token's ratio"

    def loss(
        self, logps: Tensor, old_logps: Tensor, mask: Tensor, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = (logps - old_logps).masked_fill(~mask, 0)
        return clipped_surrogate(
            log_ratio, advantages[:, None] * mask, self.options.clip_low, self.options.clip_high
        )

    def weights(self, mask: Tensor) -> Tensor:
        return mask.float()


def build(options: DAPOOptions) -> DAPO:
    return DAPO(options)


PROVIDER = Provider(
    name="dapo",
    options=DAPOOptions,
    build=build,
    summary="GRPO's token loss with a wider clip upwards, mean over all tokens",
    cite="DAPO arXiv 2503.14476 Eq 8",
)
