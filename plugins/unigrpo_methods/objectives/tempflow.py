"""TempFlow-GRPO's weighting: every step's loss times the noise it explores with.

Paper
    TempFlow-GRPO (arXiv 2508.04324), its noise-aware policy weighting; and its code.

Mathematics
    J = 1/G sum_i 1/|T_SDE| sum_t w_t min(r A_i, clip(r, 1 - c, 1 + c) A_i), w_t = scale std_t,
    std_t = sigma_t sqrt(dt) the std of the step. r is the plain ratio of Flow-GRPO, or with
    ratio_norm RatioNorm's.

Convention
    Ratio and bounds are those of ``flow_grpo``. Where all steps have std 1 / scale it is
    ``flow_grpo``.
    The paper's other part, branches of one stochastic step each, is a setting of other slots: the
    window ``random`` with size = 1 under noise_scope = "prompt", where all that the images of a
    group differ by is the noise of one step, so a step's advantage is its own.

Deviations and readings
    1. The paper normalises w_t to a mean of 1 over the steps of a trajectory. A point's loss
       depends on that point alone here, so the constant is an option: scale = 1 / (mean std of
       the trained steps) gives that mean. The code has such constants too (2.25 for SD3.5 at noise
       level .7, 1.73 for FLUX at .9). Under Adam it matters only beside regularizers.
    2. RatioNorm is not in the paper; GRPO-Guard compares with this weighting.
    3. The log-ratio is limited to +-20 (see ``surrogate``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from unigrpo_core.interfaces import ImageObjective, Scheduler
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Field, Provider
from unigrpo_core.records import ImageSegment, Points, Unit
from unigrpo_methods.objectives import steps
from unigrpo_methods.objectives.surrogate import clipped_surrogate

if TYPE_CHECKING:
    from torch import Tensor


class TempFlowOptions(steps.RatioOptions):
    scale: float = Field(
        1.0,
        gt=0,
        description="what a step's std is multiplied by to be its weight, > 0, in 1 / latent "
        "units; 1 / (mean std of the trained steps) makes the mean weight 1",
    )


@dataclass(frozen=True)
class TempFlow(ImageObjective):
    """Per-step clipped surrogate, weighted by the step's std."""

    options: TempFlowOptions
    unit: Unit | None
    clips: str
    needs: ClassVar[frozenset[str]] = frozenset()

    def points(self, segment: ImageSegment, scheduler: Scheduler, keys: Sequence[Key]) -> Points:
        return steps.segment_points(segment, scheduler)

    def log_ratio(self, points: Points, v: Tensor) -> Tensor:
        return steps.log_ratio(self.options, points, v)

    def clip_range(self, latent_elements: int) -> float:
        options = self.options
        return steps.bound(options.clip_range, options.clip_radius, latent_elements)

    def trust_radius(self, points: Points) -> Tensor:
        bound = self.clip_range(points.x_t.shape[2:].numel())
        return steps.trust_radius(points, bound, ratio_norm=self.options.ratio_norm)

    def loss(
        self,
        points: Points,
        velocities: Mapping[str, Tensor],
        advantages: Tensor,
        rewards: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        clip_range = self.clip_range(points.x_t.shape[2:].numel())
        v = velocities["current"]
        values, metrics = clipped_surrogate(self.log_ratio(points, v), advantages, clip_range)
        std = points.transition(v.detach()).std.flatten(2).mean(2)
        return values * (self.options.scale * std), metrics

    def weights(self, mask: Tensor) -> Tensor:
        return mask.float()


def build(options: TempFlowOptions) -> TempFlow:
    return TempFlow(options, options.unit, options.clips)


PROVIDER = Provider(
    name="tempflow",
    options=TempFlowOptions,
    build=build,
    summary="Flow-GRPO's loss, each step's times its std; RatioNorm optional",
    needs=("std",),
    cite="TempFlow-GRPO arXiv 2508.04324",
)
