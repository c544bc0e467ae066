"""Random: the control reward, which nothing can learn.

Mathematics
    A uniform number in [0, 1) from the episode's key.

Convention
    It reads nothing that the policy wrote or drew, so a curve that rises under it shows a fault of
    the harness (a leak, a selection) and not learning. The same episode gets the same number
    in every batch, process and resumed run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unigrpo_core.keys import Key, uniforms
from unigrpo_core.plugin import Options, Provider
from unigrpo_core.records import RewardBatch

if TYPE_CHECKING:
    from torch import Tensor

    from unigrpo_core.interfaces import ScoreFunction


def random_score(batch: RewardBatch) -> Tensor:
    """float32 [B]: a number per episode, independent of it."""
    keys = [Key(("reward", "random", key)) for key in batch.keys]
    return uniforms(keys, 1, "cpu")[:, 0].float()


def build(options: Options) -> ScoreFunction:
    return random_score


PROVIDER = Provider(
    name="random",
    build=build,
    range=(0.0, 1.0),
    summary="the control: a uniform number from the episode's key, independent of what was drawn",
)
