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
    Under a scheduler whose log-ratio leaves the variance out (``cps``) the plain ratio is that one,
    as in Flow-GRPO's code, and its clip range is stated with clip_unit = "latent^2".

Deviations and readings
    1. Eq 5 writes ||delta||^2, a sum, beside a log-ratio whose reduction the paper leaves open;
       both are means here, as in the code of Flow-GRPO and GRPO-Guard.
    2. Eq 5's text has the drift against the reference policy; its formula, used here, against the
       old one.
    3. GRPO-Guard's further division of the loss by the step's dt is not part of Eq 6 and not done
       (see ``grpo_guard``).
    4. The term -beta_img KL of Eq 6 is a regularizer (``latent_kl``, ``velocity_mse``).
    5. The log-ratio is limited to +-20 (see ``surrogate``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from unigrpo_core.interfaces import ImageObjective, Scheduler
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Provider
from unigrpo_core.records import ImageSegment, Points, Unit
from unigrpo_methods.objectives import steps
from unigrpo_methods.objectives.surrogate import clipped_surrogate

if TYPE_CHECKING:
    from torch import Tensor


class FlowGRPOOptions(steps.RatioOptions):
    """The ratio and its bound."""


@dataclass(frozen=True)
class FlowGRPO(ImageObjective):
    """Per-step clipped surrogate, averaged over the trained steps."""

    options: FlowGRPOOptions
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
        return clipped_surrogate(
            self.log_ratio(points, velocities["current"]), advantages, clip_range
        )

    def weights(self, mask: Tensor) -> Tensor:
        return mask.float()


def build(options: FlowGRPOOptions) -> FlowGRPO:
    return FlowGRPO(options, options.unit, options.clips)


PROVIDER = Provider(
    name="flow_grpo",
    options=FlowGRPOOptions,
    build=build,
    summary="clipped policy gradient on the sampler's stochastic steps; RatioNorm optional",
    needs=("std",),
    cite="UniGRPO arXiv 2603.23500 Eqs 4-6; Flow-GRPO 2505.05470; GRPO-Guard 2510.22319",
)
