"""Dr. GRPO on the tokens of the reasoning: GRPO without its bias by length.

Paper
    Dr. GRPO (Understanding R1-Zero-like training, arXiv 2503.20783), and its code, which divides by
    the generation budget.

Mathematics
    J = 1/(B M) sum_i sum_k min(r A_i, clip(r, 1 - c, 1 + c) A_i) over B sequences, where M is a
    constant, the most tokens a sequence may have. Values are -min(...), weights the mask, and the
    total they are divided by is B M. GRPO divides each sequence by its own length instead, so that
    a wrong answer costs less per token the longer it is.

Convention
    ``max_tokens`` is M; a recipe sets it to ``text.max_tokens``. Where every sequence has M tokens
    the loss is GRPO's. Since weights sum to less than the total, what is shown of the text (loss,
    metrics, regularizers) is lower by the factor mean length / M. Regularizers are trained that
    way too, so their weights mean less than beside GRPO.

Deviations and readings
    1. The paper's other change, no division by a standard deviation, is the advantage's:
       ``group_norm`` with ``std = "none"``, or ``leave_one_out``.
    2. The paper's formula has no factor 1/M, its code has; under Adam the factor acts only through
       the bound on the gradient's norm and beside other losses.
    3. A sequence longer than M is an error, because then M is not what sampling was limited to.
    4. The clip range of 0.2 is the paper's (Table 6).
    5. The log-ratio is limited to +-20 (see ``surrogate``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from unigrpo_core.errors import UserError
from unigrpo_core.interfaces import TextObjective
from unigrpo_core.plugin import Field, Options, Provider
from unigrpo_methods.objectives.surrogate import clipped_surrogate

if TYPE_CHECKING:
    from torch import Tensor


class DrGRPOOptions(Options):
    max_tokens: int = Field(
        ge=1, description="tokens that every sequence counts as, >= 1: the value of text.max_tokens"
    )
    clip_range: float = Field(
        0.2, gt=0, description="bound c on |ratio - 1| of a token, > 0 (no unit)"
    )


@dataclass(frozen=True)
class DrGRPO(TextObjective):
    """Per-token clipped surrogate, summed over tokens and divided by a constant."""

    options: DrGRPOOptions
    clips = "a token's ratio"

    def loss(
        self, logps: Tensor, old_logps: Tensor, mask: Tensor, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = (logps - old_logps).masked_fill(~mask, 0)
        return clipped_surrogate(log_ratio, advantages[:, None] * mask, self.options.clip_range)

    def weights(self, mask: Tensor) -> Tensor:
        return mask.float()

    def total(self, mask: Tensor) -> Tensor:
        """The constant for so many rows.

        Raises:
            UserError: a row has more than ``max_tokens`` tokens.
        """
        longest, most = max(mask.sum(1).tolist(), default=0), self.options.max_tokens
        if longest > most:
            raise UserError(
                f"dr_grpo divides by text.objective.max_tokens = {most} tokens per sequence, but "
                f"one of {longest} was sampled; set text.objective.max_tokens to text.max_tokens"
            )
        return self.weights(mask).new_tensor(float(len(mask) * most))


def build(options: DrGRPOOptions) -> DrGRPO:
    return DrGRPO(options)


PROVIDER = Provider(
    name="dr_grpo",
    options=DrGRPOOptions,
    build=build,
    summary="GRPO's token loss, divided by a constant length in place of each sequence's own",
    cite="Dr. GRPO arXiv 2503.20783",
)
