"""GSPO on the reasoning: one ratio, and one clip, per sequence.

Paper
    GSPO (arXiv 2507.18071), Eqs 5 to 7; its clip ranges are those of section 5.1.

Mathematics
    s_i = (pi(y_i) / pi_old(y_i))^(1/|y_i|) = exp(mean_k log r_ik),
    J = 1/G sum_i min(s_i A_i, clip(s_i, 1 - l, 1 + h) A_i).
    Every token of a sequence gets the value -min(...), weights mask / |y|, so their weighted mean
    is -J. Its gradient by a log-prob is -s_i A_i / (G |y_i|), the same all along a sequence, or 0
    where the clip acts.

Convention
    |y| counts every sampled token, the end-of-sequence token included. Padded tokens have value,
    metrics and weight 0. Both metrics are the sequence's, at each of its tokens. At length 1, and
    with the same clip ranges, the loss is GRPO's.

Deviations and readings
    1. The clip ranges, 3e-4 and 4e-4, are of a mean over tokens, which varies far less than a
       token's log-ratio; the paper finds more clipped with them than with GRPO's .2 and .27, and
       trains better. They are no ranges for GRPO or DAPO.
    2. The paper's GSPO-token, for advantages that differ along a sequence, is not needed: here an
       advantage is a sequence's, and then both have the same gradient.
    3. The mean log-ratio is limited to +-20 (see ``surrogate``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from unigrpo_core.interfaces import TextObjective
from unigrpo_core.plugin import Field, Options, Provider
from unigrpo_methods.objectives.surrogate import clipped_surrogate

if TYPE_CHECKING:
    from torch import Tensor


class GSPOOptions(Options):
    clip_low: float = Field(
        3e-4, gt=0, description="a sequence's ratio is held above 1 - clip_low, > 0 (no unit)"
    )
    clip_high: float = Field(
        4e-4, gt=0, description="a sequence's ratio is held below 1 + clip_high, > 0 (no unit)"
    )


@dataclass(frozen=True)
class GSPO(TextObjective):
    """Clipped surrogate of the sequence's mean log-ratio, averaged over sequences."""

    options: GSPOOptions
    clips = "a thought's ratio"

    def loss(
        self, logps: Tensor, old_logps: Tensor, mask: Tensor, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = (logps - old_logps).masked_fill(~mask, 0)
        mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        values, metrics = clipped_surrogate(
            mean, advantages[:, None], self.options.clip_low, self.options.clip_high
        )
        return values * mask, {name: value * mask for name, value in metrics.items()}

    def weights(self, mask: Tensor) -> Tensor:
        return mask.float() / mask.sum(1, keepdim=True).clamp(min=1)


def build(options: GSPOOptions) -> GSPO:
    return GSPO(options)


PROVIDER = Provider(
    name="gspo",
    options=GSPOOptions,
    build=build,
    summary="clipped policy gradient of whole sequences: one length-normalised ratio each",
    cite="GSPO arXiv 2507.18071 Eqs 5-7",
)
