"""PPO's clipped surrogate and its ratio, shared by the objectives.

Mathematics
    With ratio = 1 + e and A the advantage, min(ratio A, clip(ratio, 1 - l, 1 + h) A) equals
    A + min(e A, clip(e, -l, h) A). GRPO and FlowGRPO have l = h = c.

Convention
    e = expm1(log-ratio) is carried instead of the ratio: a float32 ratio near 1 has steps of 1e-7,
    a tenth of the paper's clip range of 1e-6, while e keeps all its digits and is compared with l
    and h themselves. The log-ratio is limited to +-20 before expm1, so that a branch that is not
    chosen cannot overflow and turn the gradient into NaN; beyond it the gradient is 0 and
    ``ratio_deviation`` shows it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LOG_RATIO_LIMIT = 20.0


def ratio_change(log_ratio: Tensor) -> Tensor:
    """ratio - 1, per element."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).expm1()


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, low: float, high: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss -min(ratio A, clip(ratio, 1 - low, 1 + high) A) per element, ``high`` being ``low``
    unless it is given, and without gradient

    - ``clip_fraction``: 1 where the clipped branch was chosen, so where the gradient stops, else 0;
    - ``ratio_deviation``: |ratio - 1|.
    """
    change = ratio_change(log_ratio)
    gain = change * advantages
    clipped = change.clamp(-low, low if high is None else high) * advantages
    values = -(advantages + gain.minimum(clipped))
    return values, {
        "clip_fraction": (clipped < gain).to(values.dtype),
        "ratio_deviation": change.detach().abs(),
    }
