"""Group-relative advantages: centred, and divided by a standard deviation.

Paper
    UniGRPO (arXiv 2603.23500), Eq 1; GRPO (arXiv 2402.03300); ``std = "none"``: Dr. GRPO
    (arXiv 2503.20783); ``std = "global"``: the code of Flow-GRPO (arXiv 2505.05470), whose Eq 4 has
    the group's.

Mathematics
    R_i = sum_r weight_r reward_ir,   A_i = (R_i - mean_group R) / (s + floor), where s is the
    standard deviation of R over the group, or over all valid rows; with "none" A_i = R_i - mean.
    Then A_i is limited to +-clip. With ``percentiles`` R_i is limited to those of its group before.

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
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import model_validator

from unigrpo_core.interfaces import Advantage
from unigrpo_core.plugin import Field, Options, Provider
from unigrpo_methods.advantages import groups

if TYPE_CHECKING:
    from torch import Tensor


WHOLE = (0.0, 100.0)
Percentile = Annotated[float, Field(ge=0, le=100)]


class GroupNormOptions(Options):
    std: Literal["group", "global", "none"] = Field(
        "group", description="whose standard deviation divides: the group's, all rows', or none"
    )
    floor: float = Field(
        1e-6, ge=0, description="added to the standard deviation, >= 0, in units of the reward"
    )
    clip: float = Field(5.0, ge=0, description="bound on |advantage|, >= 0 (no unit); 0 is off")
    percentiles: tuple[Percentile, Percentile] = Field(
        WHOLE,
        description="low and high percentile of its group, 0 to 100, that a reward is limited to "
        "before all else; [0, 100] is off",
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        low, high = self.percentiles
        if low >= high:
            raise ValueError(f"percentiles = [{low:g}, {high:g}]: the first must be the lower one")
        return self


@dataclass(frozen=True)
class GroupNorm(Advantage):
    """Eq 1 with the choices above."""

    options: GroupNormOptions

    def __call__(self, rewards: Tensor, weights: Tensor, group: Tensor, valid: Tensor) -> Tensor:
        import torch

        options, group = self.options, groups.numbered(group)
        values = groups.combined(rewards, weights, valid)
        if options.percentiles != WHOLE:
            values = groups.held(values, group, valid, options.percentiles)
        result = groups.centred(values, group, valid)
        if options.std != "none":
            pool = group if options.std == "group" else torch.zeros_like(group)
            result = groups.scaled(result, values, pool, valid, options.floor)
        if options.clip:
            result = result.clamp(-options.clip, options.clip)
        return result.float()


def build(options: GroupNormOptions) -> GroupNorm:
    return GroupNorm(options)


PROVIDER = Provider(
    name="group_norm",
    options=GroupNormOptions,
    build=build,
    summary="reward less the group's mean, over the group's standard deviation",
    cite="UniGRPO arXiv 2603.23500 Eq 1; GRPO arXiv 2402.03300",
)
