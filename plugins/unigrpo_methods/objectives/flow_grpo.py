"""FlowGRPO on the stochastic steps of the image, with or without RatioNorm.

Paper
    UniGRPO (arXiv 2603.23500), Eqs 4 to 6; Flow-GRPO (arXiv 2505.05470); RatioNorm: GRPO-Guard
    (arXiv 2510.22319).

Mathematics
    Each trained step is Gaussian, x_next ~ N(mu, std^2 I), std = sigma_t sqrt(dt). With delta =
    mu - mu_old and means taken over the d latent elements,

        plain (Eq 4)      log r  = mean(delta (2 (x_next - mu_old) - delta)) / (2 std^2)
        RatioNorm (Eq 5)  log r~ = std (log r + mean(delta^2) / (2 std^2))
                                 = mean(delta (x_next - mu_old)) / std.

    The second form of Eq 5 is the one computed: delta^2 cancels, and what is left is the mean of
    delta times the step's standard normal noise, of mean 0 and without a factor of the schedule.
    J = 1/G sum_i 1/|T_SDE| sum_t min(r A_i, clip(r, 1 - c, 1 + c) A_i). Values are -min(...),
    weights 1.

Convention
    Log-ratios are means over latent elements, not sums. A drift of mu by a fixed rms moves the
    RatioNorm log-ratio by that rms / sqrt(d), so its bound is given as ``clip_radius``, the rms
    itself: c = clip_radius / sqrt(d). The paper's 1e-6 is a radius of about 5.1e-4 at d = 262,144.
    The points are the stored steps of the sampler; ratio and clip are evaluated through expm1.

Deviations and readings
    1. Eq 5 writes ||delta||^2, a sum, beside a log-ratio whose reduction the paper leaves open;
       both are means here, as in the code of Flow-GRPO and GRPO-Guard.
    2. Eq 5's text has the drift against the reference policy; its formula, used here, against the
       old one.
    3. GRPO-Guard's further division of the loss by the step's dt is not part of Eq 6 and not done.
    4. The term -beta_img KL of Eq 6 is a regularizer (``latent_kl``, ``velocity_mse``).
    5. The log-ratio is limited to +-20 (see ``surrogate``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import model_validator

from unigrpo_core.interfaces import ImageObjective, Scheduler
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Field, Options, Provider
from unigrpo_core.records import ImageSegment, Points
from unigrpo_methods.objectives.surrogate import clipped_surrogate

if TYPE_CHECKING:
    from torch import Tensor

PAPER_RADIUS = 5.1e-4


class FlowGRPOOptions(Options):
    ratio_norm: bool = Field(False, description="take Eq 5's RatioNorm in place of the plain ratio")
    clip_range: float | None = Field(
        None, gt=0, description="bound c on |ratio - 1| of a step, > 0 (no unit); absolute"
    )
    clip_radius: float | None = Field(
        None,
        gt=0,
        description="with ratio_norm: c = clip_radius / sqrt(latent elements), > 0, in latent "
        f"units (rms drift of the mean); {PAPER_RADIUS} if neither bound is given",
    )

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if self.clip_range is not None and self.clip_radius is not None:
            raise ValueError("clip_range and clip_radius are two ways to say one bound; give one")
        if not self.ratio_norm and self.clip_radius is not None:
            raise ValueError("clip_radius needs ratio_norm = true; a plain ratio takes clip_range")
        if not self.ratio_norm and self.clip_range is None:
            raise ValueError("clip_range is required, unless ratio_norm = true (then clip_radius)")
        return self


@dataclass(frozen=True)
class FlowGRPO(ImageObjective):
    """Per-step clipped surrogate, averaged over the trained steps."""

    options: FlowGRPOOptions
    needs: ClassVar[frozenset[str]] = frozenset()

    def points(self, segment: ImageSegment, scheduler: Scheduler, keys: Sequence[Key]) -> Points:
        return Points(
            x_t=segment.x_t,
            t=segment.t,
            t_next=segment.t_next,
            noise_level=segment.noise_level,
            x_next=segment.x_next,
            old_mean=segment.old_mean,
            kernel=scheduler.transition,
        )

    def log_ratio(self, points: Points, v: Tensor) -> Tensor:
        transition = points.transition(v)
        if not self.options.ratio_norm:
            return transition.log_ratio(points.x_next, points.old_mean)
        noise = (points.x_next - points.old_mean) / transition.std
        return ((transition.mean - points.old_mean) * noise).flatten(2).mean(2)

    def clip_range(self, latent_elements: int) -> float:
        if self.options.clip_range is not None:
            return self.options.clip_range
        return (self.options.clip_radius or PAPER_RADIUS) / sqrt(latent_elements)

    def trust_radius(self, points: Points) -> Tensor:
        # The noise makes the log-ratio of a drift vary by rms / sqrt(d), over std if plain.
        elements = points.x_t.shape[2:].numel()
        radius = self.clip_range(elements) * sqrt(elements)
        if self.options.ratio_norm:
            return points.t.new_full(points.t.shape, radius)
        # std does not depend on the velocity: any will do.
        return radius * points.transition(points.x_t).std.flatten(2).mean(2)

    def loss(
        self,
        points: Points,
        velocities: Mapping[str, Tensor],
        advantages: Tensor,
        rewards: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        clip_range = self.clip_range(points.x_t.shape[2:].numel())
        return clipped_surrogate(
            self.log_ratio(points, velocities["current"]), advantages, clip_range
        )

    def weights(self, mask: Tensor) -> Tensor:
        return mask.float()


def build(options: FlowGRPOOptions) -> FlowGRPO:
    return FlowGRPO(options)


PROVIDER = Provider(
    name="flow_grpo",
    options=FlowGRPOOptions,
    build=build,
    summary="clipped policy gradient on the sampler's stochastic steps; RatioNorm optional",
    needs=("std",),
    cite="UniGRPO arXiv 2603.23500 Eqs 4-6; Flow-GRPO 2505.05470; GRPO-Guard 2510.22319",
)
