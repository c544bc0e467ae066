"""A workload on a BAGEL of given sizes: what its memory and its work are counted from. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unigrpo_core.workload import MicroBatch, Workload
from unigrpo_models.bagel import accounting
from unigrpo_models.bagel.accounting import BOUNDARY
from unigrpo_models.bagel.config import BagelConfig

FLOAT32 = 4
COMMON = 128  # a text's width in bf16 is the next multiple of it


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters: their rank (0: none), and the matrices that have one, by expert."""

    rank: int
    modules: Mapping[str, tuple[str, ...]]

    def experts(self, train: frozenset[str]) -> frozenset[str]:
        """Those of the trained experts that have any."""
        return frozenset(e for e in train if self.rank and self.modules.get(e))


@dataclass(frozen=True)
class Counted:
    """The workload, and the numbers that its memory and its work share."""

    config: BagelConfig
    adapters: Adapters
    load: Workload

    @property
    def itemsize(self) -> int:
        """Bytes of a number as the model computes."""
        return FLOAT32 if self.load.precision == "float32" else 2

    @property
    def latents(self) -> int:
        """Latent tokens of an image."""
        height, width = self.load.size
        stride = self.config.latent.stride
        return (height // stride) * (width // stride) if self.load.images else 0

    @property
    def context(self) -> int:
        """Tokens of a context as they are computed."""
        tokens = self.load.context
        return tokens if self.itemsize == FLOAT32 else tokens + COMMON - tokens % COMMON

    @property
    def lora(self) -> frozenset[str]:
        """The trained experts that get their training through adapters."""
        return self.adapters.experts(self.load.train)

    @property
    def full(self) -> frozenset[str]:
        """Those that are trained whole."""
        return self.load.train - self.lora

    def trained(self) -> int:
        """Parameters that an update moves."""
        return accounting.trained_parameters(
            self.config,
            self.load.train,
            self.lora,
            rank=self.adapters.rank,
            modules=self.adapters.modules,
        )

    @property
    def share(self) -> int:
        """Contexts of an update."""
        return self.load.rows // self.load.updates if self.load.disjoint else self.load.rows

    def batches(self) -> tuple[MicroBatch, ...]:
        """The micro-batches of an update."""
        return self.load.micro_batches(self.share, self.latents + BOUNDARY)
