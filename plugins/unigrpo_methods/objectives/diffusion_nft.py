"""DiffusionNFT: flow matching towards better images and away from worse ones, without ratios.

Paper
    DiffusionNFT (arXiv 2509.16117), Eq 5 and its practical implementation; the public code of its
    authors.

Mathematics
    At fresh points (see ``fresh``), with v the current and v_old the sampling weights' velocity,

        v+ = (1 - b) v_old + b v,   v- = (1 + b) v_old - b v,
        r = .5 + .5 clip(A / Z, -1, 1),
        loss = r |v+ - v*|^2 + (1 - r) |v- - v*|^2,

    means over the latent elements. With ``weighting`` "self_normalised" each |v' - v*|^2 becomes
    |x0' - x0|^2 / sg(mean |x0' - x0|), x0' = x_t - t v', which is t mean((v' - v*)^2) / sg(mean
    |v' - v*|), the divisor at least 1e-5; sg stops the gradient.

Convention
    v+- are computed as v_old +- b (v - v_old), so that they are equal bit for bit at v = v_old.
    There the gradient by an element of v is 2 b (2 r - 1) (v - v*) / d: that of flow matching,
    times b clip(A / Z, -1, 1); at r = .5 it is 0. Away from v_old, r = .5 pulls back to it.
    There is no ratio and no clip; ``log_ratio``, which then is for the eyes alone, is by how much
    flow matching's error is lower than the old weights', in squared latent units.

Deviations and readings
    1. r is the paper's optimality probability, which takes the reward less the group's mean over
       Z; for Z the paper suggests a global standard deviation. Here A is the recipe's advantage, as
       in the authors' code, which divides group-normalised ones by their bound, adv_clip_max = 5:
       the default.
    2. The code divides the loss by b and multiplies it by Z. Neither changes what Adam does, but
       the weight of a regularizer counts in units of this loss.
    3. The code takes the times of its sampler's grid, each once; here they are drawn.
    4. The rollout by the moving average of the weights, by an ODE and without guidance, is the
       recipe's: [ema] with sample = true. v_old is always of the weights that sampled.
    5. The code's KL, a mean of (v - v_reference)^2 of weight 1e-4, is the regularizer
       ``velocity_mse``.
    6. The paper takes b = 1 or .1, "for faster reward increase"; .1 is the default here.
    7. The paper's practical version, and its code, weigh by "self_normalised"; the default here is
       Eq 5 as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from unigrpo_core.interfaces import ImageObjective, Scheduler
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Field, Provider
from unigrpo_core.records import ImageSegment, Points
from unigrpo_methods.objectives.fresh import FreshOptions, fresh_points, gain, mean_square, target

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_DIVISOR = 1e-5


class DiffusionNFTOptions(FreshOptions):
    beta: float = Field(0.1, gt=0, description="b, how far v+ and v- are from v_old, > 0 (no unit)")
    scale: float = Field(
        5.0,
        gt=0,
        description="Z, the advantage at which r is 1, > 0 (no unit): the bound of the advantages",
    )
    weighting: Literal["velocity", "self_normalised"] = Field(
        "velocity", description="of the squared errors: none, or over the error's own size in x0"
    )


@dataclass(frozen=True)
class DiffusionNFT(ImageObjective):
    """The loss above at fresh points, averaged over them."""

    options: DiffusionNFTOptions
    needs: ClassVar[frozenset[str]] = frozenset({"old"})
    fresh: ClassVar[bool] = True

    def points(self, segment: ImageSegment, scheduler: Scheduler, keys: Sequence[Key]) -> Points:
        return fresh_points(segment, scheduler, keys, self.options)

    def count(self, stored: int) -> int:
        return self.options.times

    def log_ratio(self, points: Points, v: Tensor) -> Tensor:
        return gain(points, v)

    def clip_range(self, latent_elements: int) -> float:
        return math.inf

    def trust_radius(self, points: Points) -> Tensor:
        return points.t.new_full(points.t.shape, math.inf)

    def loss(
        self,
        points: Points,
        velocities: Mapping[str, Tensor],
        advantages: Tensor,
        rewards: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        old = velocities["old"].detach()
        step = self.options.beta * (velocities["current"] - old)
        residual = old - target(points)
        better, worse = (self._error(points, residual + sign * step) for sign in (1, -1))
        r = 0.5 + 0.5 * (advantages / self.options.scale).clamp(-1, 1)
        return r * better + (1 - r) * worse, {
            "optimality": r.detach(),
            "positive_error": better.detach(),
            "negative_error": worse.detach(),
        }

    def _error(self, points: Points, residual: Tensor) -> Tensor:
        """[B, K]: the error of a velocity that is off by ``residual`` [B, K, *]."""
        square = mean_square(residual)
        if self.options.weighting == "velocity":
            return square
        size = points.t * residual.detach().abs().flatten(2).mean(2)
        return points.t.square() * square / size.clamp(min=SMALLEST_DIVISOR)

    def weights(self, mask: Tensor) -> Tensor:
        return mask.float()


def build(options: DiffusionNFTOptions) -> DiffusionNFT:
    return DiffusionNFT(options)


PROVIDER = Provider(
    name="diffusion_nft",
    options=DiffusionNFTOptions,
    build=build,
    summary="flow matching towards better images and away from worse ones, freshly noised",
    cite="DiffusionNFT arXiv 2509.16117 Eq 5",
)
