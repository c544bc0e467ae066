"""Brightness: the mean of all pixels, the simplest reward an image policy can be seen to learn.

Mathematics
    mean over channels, rows and columns of an image in [0, 1]; 0 is black, 1 white.

Convention
    Differentiable, and blind to the prompt: for smoke tests, not for training a model to keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from unigrpo_core.interfaces import Reward
from unigrpo_core.plugin import Options, Provider
from unigrpo_core.records import RewardBatch

if TYPE_CHECKING:
    from torch import Tensor


class BrightnessOptions(Options):
    """There is nothing to choose."""


class Brightness(Reward):
    """The mean pixel."""

    reads: ClassVar[frozenset[str]] = frozenset({"image"})
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def score(self, batch: RewardBatch) -> Tensor:
        """float32 [B].

        Raises:
            ValueError: the episodes have no image.
        """
        if batch.images is None:
            raise ValueError("the reward 'brightness' reads an image, and the episode draws none")
        return batch.images.float().flatten(1).mean(1)

    def details(self, batch: RewardBatch) -> Mapping[str, Tensor]:
        return {}


def build(options: BrightnessOptions) -> Brightness:
    return Brightness()


PROVIDER = Provider(
    name="brightness",
    options=BrightnessOptions,
    build=build,
    differentiable=True,
    summary="mean pixel of the image, in [0, 1]; differentiable",
)
