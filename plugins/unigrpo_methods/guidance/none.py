"""No guidance: the conditional velocity alone.

Paper
    UniGRPO (arXiv 2603.23500), first of its two changes: no CFG in training.

Mathematics
    v.

Convention
    One model call per step and no unconditional context, so a history never branches.

Deviations and readings
    1. None.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from unigrpo_core.interfaces import Guidance
from unigrpo_core.plugin import Options, Provider

if TYPE_CHECKING:
    from torch import Tensor


class NoGuidanceOptions(Options):
    """There is nothing to choose."""


class NoGuidance(Guidance):
    """The identity."""

    branches = ()

    def active(self, t: Tensor) -> Tensor:
        import torch

        return torch.zeros_like(t, dtype=torch.bool)

    def combine(self, v: Tensor, branches: Mapping[str, Tensor], t: Tensor) -> Tensor:
        return v


def build(options: NoGuidanceOptions) -> NoGuidance:
    return NoGuidance()


PROVIDER = Provider(
    name="none",
    options=NoGuidanceOptions,
    build=build,
    summary="the conditional velocity alone: one call per step, no branching",
    cite="UniGRPO arXiv 2603.23500 section on training without CFG",
)
