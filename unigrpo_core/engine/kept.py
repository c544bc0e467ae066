"""Values that are kept while a rollout is trained on: what losses and gaps compare with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unigrpo_core.engine.trainset import MicroBatch, TrainSet


@dataclass(frozen=True, eq=False)
class Velocity:
    """A micro-batch's velocities, [B, K, *]."""

    guided: Tensor
    conditional: Tensor


@dataclass(frozen=True, eq=False)
class Values:
    """Kept values of every context: of the weights that sampled, or of an anchor."""

    logps: Tensor  # float32 [B, L]
    guided: Tensor | None  # float32 [B, K, *], after guidance
    conditional: Tensor | None  # float32 [B, K, *]

    @classmethod
    def blank(cls, data: TrainSet) -> Values:
        shape = None if data.points is None else data.points.x_t
        guided = None if shape is None else torch.zeros_like(shape)
        return cls(
            torch.zeros_like(data.logps),
            guided,
            None if shape is None else torch.zeros_like(shape),
        )

    def put(self, batch: MicroBatch, logps: Tensor | None, v: Velocity | None) -> None:
        if logps is not None:
            self.logps[batch.rows, : logps.shape[1]] = logps.detach()
        if v is not None and self.guided is not None and self.conditional is not None:
            self.guided[batch.rows, batch.columns] = v.guided.detach()
            self.conditional[batch.rows, batch.columns] = v.conditional.detach()


@dataclass(frozen=True, eq=False)
class Kept:
    """The values that losses compare with: of the weights that sampled, and of anchors by name."""

    old: Values
    anchors: Mapping[str, Values]

    def anchor(self, name: str) -> Values:
        return self.old if name == "old" else self.anchors[name]
