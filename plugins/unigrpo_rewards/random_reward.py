"""Random: the control reward, which nothing can learn.

Mathematics
    A uniform number in [0, 1) from the episode's key.

Convention
    It reads nothing that the policy wrote or drew, so a curve that rises under it shows a fault of
    the harness (a leak, a selection) and not learning. The same episode gets the same number
    in every batch, process and resumed run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from unigrpo_core.interfaces import Reward
from unigrpo_core.keys import Key, uniforms
from unigrpo_core.plugin import Options, Provider
from unigrpo_core.records import RewardBatch

if TYPE_CHECKING:
    from torch import Tensor


class RandomRewardOptions(Options):
    """There is nothing to choose."""


class RandomReward(Reward):
    """A number per episode, independent of it."""

    reads: ClassVar[frozenset[str]] = frozenset()
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def score(self, batch: RewardBatch) -> Tensor:
        keys = [Key(("reward", "random", key)) for key in batch.keys]
        return uniforms(keys, 1, "cpu")[:, 0].float()

    def details(self, batch: RewardBatch) -> Mapping[str, Tensor]:
        return {}


def build(options: RandomRewardOptions) -> RandomReward:
    return RandomReward()


PROVIDER = Provider(
    name="random",
    options=RandomRewardOptions,
    build=build,
    summary="the control: a uniform number from the episode's key, independent of what was drawn",
)
