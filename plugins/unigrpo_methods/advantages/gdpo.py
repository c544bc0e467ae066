"""GDPO: every reward normalised on its own, then summed, then normalised over the batch.

Paper
    GDPO (arXiv 2601.05242); its public code, and TRL's ``normalize_then_sum``.

Mathematics
    A_ir = (reward_ir - mean_group reward_r) / (std_group reward_r + floor)
    S_i = sum_r weight_r A_ir,   A_i = (S_i - mean_all S) / (std_all S + floor).
    Rewards of different scale count by their weights alone, and rows whose rewards differ but add
    up to the same stay apart.

Convention
    Standard deviations are the population's. Arithmetic is float64, the result float32. Invalid
    rows get 0 and count for nothing. Where all rewards of a group are equal it gets exactly 0; one
    reward that is equal throughout a group drops out of that group alone.

Deviations and readings
    1. mean_all S is 0, for every group sums to 0. It is not taken off: a rest of rounding would
       reach groups of equal rewards, which are to get exactly 0.
    2. The code divides by the sample's standard deviations; those of the groups cancel to a common
       factor if groups are equally large, and that of the batch is sqrt(E / (E - 1)) larger.
    3. TRL's version adds 1e-4 to each; here 1e-6 as in ``group_norm``, where the reason is given.
    4. No clip in the paper, and none by default.
    5. The code's verl version averages the last step over tokens, so that long texts count more.
       Here, as in its TRL version, every row counts once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from unigrpo_core.interfaces import Advantage
from unigrpo_core.plugin import Field, Options, Provider
from unigrpo_methods.advantages import groups

if TYPE_CHECKING:
    from torch import Tensor


class GDPOOptions(Options):
    floor: float = Field(
        1e-6,
        ge=0,
        description="added to every standard deviation, >= 0, in units of the reward for those of "
        "groups, without one for that of the batch",
    )
    clip: float = Field(0.0, ge=0, description="bound on |advantage|, >= 0 (no unit); 0 is off")


@dataclass(frozen=True)
class GDPO(Advantage):
    """Normalised per reward and group, and once more per batch."""

    options: GDPOOptions

    def __call__(self, rewards: Tensor, weights: Tensor, group: Tensor, valid: Tensor) -> Tensor:
        import torch

        floor, group = self.options.floor, groups.numbered(group)
        columns = groups.known(rewards, valid).unbind(1)
        result = torch.zeros(len(group), dtype=torch.float64)
        for column, weight in zip(columns, weights.double(), strict=True):
            own = groups.centred(column, group, valid)
            result = result + weight * groups.scaled(own, column, group, valid, floor)
        result = groups.scaled(result, result, torch.zeros_like(group), valid, floor)
        if self.options.clip:
            result = result.clamp(-self.options.clip, self.options.clip)
        return result.float()


def build(options: GDPOOptions) -> GDPO:
    return GDPO(options)


PROVIDER = Provider(
    name="gdpo",
    options=GDPOOptions,
    build=build,
    summary="each reward normalised in its group on its own, summed, normalised over the batch",
    cite="GDPO arXiv 2601.05242",
)
