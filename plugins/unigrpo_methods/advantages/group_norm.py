"""Group-relative advantages: centred, and divided by a standard deviation.

Paper
    UniGRPO (arXiv 2603.23500), Eq 1; GRPO (arXiv 2402.03300); ``std = "none"``: Dr. GRPO
    (arXiv 2503.20783); ``std = "global"``: Flow-GRPO (arXiv 2505.05470).

Mathematics
    R_i = sum_r weight_r reward_ir,   A_i = (R_i - mean_group R) / (s + floor), where s is the
    standard deviation of R over the group, or over all valid rows; with "none" A_i = R_i - mean.
    Then A_i is limited to +-clip.

Convention
    Rewards are combined first and normalised after. Arithmetic is float64, the result float32.
    Invalid rows get 0 and enter neither a mean nor a std. A group whose rewards are all equal gets
    exactly 0, whatever the floor, because R is taken relative to the smallest of its group.

Deviations and readings
    1. Eq 1 does not say whether std is the population's or the sample's; the population's here, as
       in Flow-GRPO's code. It exists for every group, and the sample's (TRL's) is
       sqrt(G / (G - 1)) larger, 2 % at the paper's G = 24.
    2. Eq 1 has no floor. The default, 1e-6, changes an advantage by .1 % at a std of 1e-3, while a
       group of rewards near 1 that differ by float32 rounding alone (6e-8) stays below .06. Others
       add 1e-4, which also shrinks real differences.
    3. Eq 1 has no clip. The default is Flow-GRPO's 5; with std "group" |A| <= sqrt(G - 1) anyway,
       so it is inert for G <= 26.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from unigrpo_core.interfaces import Advantage
from unigrpo_core.plugin import Field, Options, Provider

if TYPE_CHECKING:
    from torch import Tensor


class GroupNormOptions(Options):
    std: Literal["group", "global", "none"] = Field(
        "group", description="whose standard deviation divides: the group's, all rows', or none"
    )
    floor: float = Field(
        1e-6, ge=0, description="added to the standard deviation, >= 0, in units of the reward"
    )
    clip: float = Field(5.0, ge=0, description="bound on |advantage|, >= 0 (no unit); 0 is off")


@dataclass(frozen=True)
class GroupNorm(Advantage):
    """Eq 1 with the choices above."""

    options: GroupNormOptions

    def __call__(self, rewards: Tensor, weights: Tensor, group: Tensor, valid: Tensor) -> Tensor:
        import torch

        group = torch.unique(group, return_inverse=True)[1]
        known = rewards.double().masked_fill(~valid[:, None], 0)
        combined = (known * weights.double()).sum(1)
        centred = _centred(combined, group, valid)
        if self.options.std != "none":
            pool = group if self.options.std == "group" else torch.zeros_like(group)
            variance = _mean(_centred(combined, pool, valid).square(), pool, valid)
            # Where the std is 0 so is the numerator: any divisor gives the 0 wanted.
            centred = centred / (variance.sqrt() + self.options.floor).where(variance > 0, 1)
        if self.options.clip:
            centred = centred.clamp(-self.options.clip, self.options.clip)
        return centred.float()


def _centred(values: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """[E]: values less the mean of their group, numbered from 0; 0 at invalid rows."""
    infinite = values.masked_fill(~valid, float("inf"))
    smallest = infinite.scatter_reduce(0, group, infinite, "amin", include_self=False)
    above = (values - smallest[group]).masked_fill(~valid, 0)  # exactly 0 among equal values
    return (above - _mean(above, group, valid)).masked_fill(~valid, 0)


def _mean(values: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """[E]: the mean over the valid rows of each row's group; values are 0 at the invalid ones."""
    zeros = values.new_zeros(values.shape)
    total = zeros.index_add(0, group, values)
    count = zeros.index_add(0, group, valid.to(values.dtype))
    return (total / count.clamp(min=1))[group]


def build(options: GroupNormOptions) -> GroupNorm:
    return GroupNorm(options)


PROVIDER = Provider(
    name="group_norm",
    options=GroupNormOptions,
    build=build,
    summary="reward less the group's mean, over the group's standard deviation",
    cite="UniGRPO arXiv 2603.23500 Eq 1; GRPO arXiv 2402.03300",
)
