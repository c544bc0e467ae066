"""GRPO-Guard: RatioNorm, and every step's loss over its dt.

Paper
    GRPO-Guard (arXiv 2510.22319), Eqs 8 and 12; and its code (the GRPO-Guard script of Flow-GRPO's
    repository).

Mathematics
    log r~ = mean(delta (x_next - mu_old)) / std with delta = mu - mu_old, as ``flow_grpo`` with
    ratio_norm. The derivative of mu by the velocity is proportional to dt, so a step's gradient is
    too; the loss of a step is divided by its dt = t - t_next > 0:
    J = 1/G sum_i 1/|T_SDE| sum_t 1/dt min(r~ A_i, clip(r~, 1 - c, 1 + c) A_i).

Convention
    c = clip_radius / sqrt(d) or an absolute clip_range, as in ``flow_grpo``. The default radius is
    the paper's clip of 2e-6 at d = 65,536, which is UniGRPO's of 1e-6 at d = 262,144.
    1/dt is not normalised, as in the code: it multiplies the loss by about the number of steps
    (more where a shift makes dt small), and so changes its share beside the regularizers.
    reweight = "none" leaves the factor out: that is ``flow_grpo`` with ratio_norm.

Deviations and readings
    1. The paper's factor for DanceGRPO's sampler is (1 + a^2 (1 - t) / 2t) / dt, a its noise level;
       here it is 1/dt under every sampler, as in the code.
    2. The code divides by the mean dt over the batch, which holds one step at a time; here each
       point has its own.
    3. Norms and log-ratios are means over latent elements, as in the code.
    4. The log-ratio is limited to +-20 (see ``surrogate``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import model_validator

from unigrpo_core.interfaces import ImageObjective, Scheduler
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Field, Options, Provider
from unigrpo_core.records import ImageSegment, Points
from unigrpo_methods.objectives import steps
from unigrpo_methods.objectives.surrogate import clipped_surrogate

if TYPE_CHECKING:
    from torch import Tensor


class GRPOGuardOptions(Options):
    clip_range: float | None = Field(
        None, gt=0, description="bound c on |ratio - 1| of a step, > 0 (no unit); absolute"
    )
    clip_radius: float | None = Field(
        None,
        gt=0,
        description="c = clip_radius / sqrt(latent elements), > 0, in latent units (rms drift of "
        f"the mean); {steps.PAPER_RADIUS} if neither bound is given",
    )
    reweight: Literal["inverse_dt", "none"] = Field(
        "inverse_dt", description='what a step\'s loss is multiplied by: "inverse_dt" or "none" (1)'
    )

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if self.clip_range is not None and self.clip_radius is not None:
            raise ValueError("clip_range and clip_radius are two ways to say one bound; give one")
        return self


@dataclass(frozen=True)
class GRPOGuard(ImageObjective):
    """Per-step clipped surrogate of the normalised ratio, over dt."""

    options: GRPOGuardOptions
    needs: ClassVar[frozenset[str]] = frozenset()
    clips = "latent, of drifts"

    def points(self, segment: ImageSegment, scheduler: Scheduler, keys: Sequence[Key]) -> Points:
        return steps.segment_points(segment, scheduler)

    def log_ratio(self, points: Points, v: Tensor) -> Tensor:
        return steps.ratio_norm(points, points.transition(v))

    def clip_range(self, latent_elements: int) -> float:
        options = self.options
        return steps.bound(options.clip_range, options.clip_radius, latent_elements)

    def trust_radius(self, points: Points) -> Tensor:
        bound = self.clip_range(points.x_t.shape[2:].numel())
        return steps.trust_radius(points, bound, ratio_norm=True)

    def loss(
        self,
        points: Points,
        velocities: Mapping[str, Tensor],
        advantages: Tensor,
        rewards: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        clip_range = self.clip_range(points.x_t.shape[2:].numel())
        values, metrics = clipped_surrogate(
            self.log_ratio(points, velocities["current"]), advantages, clip_range
        )
        if self.options.reweight == "inverse_dt":
            values = values / (points.t - points.t_next)
        return values, metrics

    def weights(self, mask: Tensor) -> Tensor:
        return mask.float()


def build(options: GRPOGuardOptions) -> GRPOGuard:
    return GRPOGuard(options)


PROVIDER = Provider(
    name="grpo_guard",
    options=GRPOGuardOptions,
    build=build,
    summary="RatioNorm's clipped policy gradient, each step's loss over its dt",
    needs=("std",),
    cite="GRPO-Guard arXiv 2510.22319",
)
