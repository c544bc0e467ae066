"""Leave-one-out advantages: a reward less the mean of the others of its group.

Paper
    RLOO: Ahmadian et al. (arXiv 2402.14740); first in Kool et al. (Buy 4 REINFORCE samples, get a
    baseline for free!, 2019).

Mathematics
    R_i = sum_r weight_r reward_ir,   A_i = R_i - 1/(n - 1) sum_{j != i} R_j
                                          = n/(n - 1) (R_i - mean_group R)
    for a group of n rows. The baseline of a row does not depend on it, so the policy gradient
    stays unbiased; less the mean of all, it shrinks by (n - 1)/n.

Convention
    Nothing is divided by a standard deviation: advantages have the unit of the rewards. Arithmetic
    is float64, the result float32. Invalid rows get 0 and count for nothing. A group whose rewards
    are all equal gets exactly 0, and so does a row that is alone, which has no others.

Deviations and readings
    1. The paper takes the KL from the reference off the reward; here it is a regularizer
       (``text_kl``, ``latent_kl``).
    2. It uses REINFORCE without a clip, whole texts being the actions. Which loss goes with these
       advantages is the objectives' matter.
    3. No clip in the paper, and none by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from unigrpo_core.interfaces import Advantage
from unigrpo_core.plugin import Field, Options, Provider
from unigrpo_methods.advantages import groups

if TYPE_CHECKING:
    from torch import Tensor


class LeaveOneOutOptions(Options):
    clip: float = Field(
        0.0, ge=0, description="bound on |advantage|, >= 0, in units of the reward; 0 is off"
    )


@dataclass(frozen=True)
class LeaveOneOut(Advantage):
    """Each row against the mean of its siblings."""

    options: LeaveOneOutOptions

    def __call__(self, rewards: Tensor, weights: Tensor, group: Tensor, valid: Tensor) -> Tensor:
        group = groups.numbered(group)
        result = groups.centred(groups.combined(rewards, weights, valid), group, valid)
        count = groups.size(group, valid)[group].double()
        result = result * count / (count - 1).clamp(min=1)
        if self.options.clip:
            result = result.clamp(-self.options.clip, self.options.clip)
        return result.float()


def build(options: LeaveOneOutOptions) -> LeaveOneOut:
    return LeaveOneOut(options)


PROVIDER = Provider(
    name="leave_one_out",
    options=LeaveOneOutOptions,
    build=build,
    summary="reward less the mean of the others in its group, undivided (RLOO)",
    cite="RLOO arXiv 2402.14740",
)
