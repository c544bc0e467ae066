"""Advantage Weighted Matching: the flow-matching loss as a log-prob, under PPO's clip.

Paper
    AWM (arXiv 2509.25050) and the public code of its authors; Flow-Factory's guide for the clip
    range.

Mathematics
    At fresh points (see ``fresh``), with means over the latent elements,

        log p = -w(t) E^p / p,   E = |v - v*|^2 + 1e-10,

    w(t) = 1, t or t^2; p = 1 is the paper's form, w(t) "t" with p = .25 the code's "ghuber". The
    loss is -min(r A, clip(r, 1 - c, 1 + c) A), r = exp(log p - log p_old), with the sampling
    weights' log p_old at the same points.

Convention
    With g = E_old - E, a product (see ``fresh.gain``), the log-ratio is w g for p = 1 and
    -w E_old^p expm1(p log1p(-g / E_old)) / p for p < 1, where E counts as at least a millionth of
    E_old. It is exactly 0 at the old velocity, where the gradient of the loss is that of A w |v -
    v*|^2, times E^(p - 1).
    Unit: log p is a mean of squared velocities, so in squared latent units for p = 1, not in nats:
    c = 1e-5 acts where flow matching's error of a point has fallen or risen by 1e-5 / w(t),
    whatever the number of elements.

Deviations and readings
    1. log p has a mean over the elements where a density has a sum, as in the code: r is no ratio
       of densities but close to 1 even for large d.
    2. c = 1e-5 is what Flow-Factory's guide advises; the default of its code is 1e-4. The authors'
       own runs state 1, which hardly ever acts.
    3. The authors' runs have "ghuber", p = .25, and advantages divided by their bound of 5; here
       w = 1, p = 1 and the advantage as it comes. A scale changes nothing for Adam.
    4. One ratio per point; the code also knows one per image, exp of the mean over its points.
    5. Times: the code stratifies over the image's points and shares them among images; here each
       image has its own. Its other densities, the sampler's grid among them, are left out.
    6. The KL terms to the reference and to a moving average are regularizers (``velocity_mse``).
    7. The log-ratio is limited to +-20 (see ``surrogate``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from unigrpo_core.interfaces import ImageObjective, Scheduler
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Field, Provider
from unigrpo_core.records import ImageSegment, Points
from unigrpo_methods.objectives.fresh import (
    FreshOptions,
    fresh_points,
    gain,
    gain_radius,
    mean_square,
    old_error,
    target,
)
from unigrpo_methods.objectives.surrogate import clipped_surrogate

if TYPE_CHECKING:
    from torch import Tensor

FLOOR = 1e-10
SMALLEST_REST = 1e-6
EXPONENTS = {"one": 0, "t": 1, "t^2": 2}


class AWMOptions(FreshOptions):
    clip_range: float = Field(
        1e-5,
        gt=0,
        description="bound c on |ratio - 1| of a point, > 0; log p is in squared latent units",
    )
    weighting: Literal["one", "t", "t^2"] = Field("one", description="w(t) of log p")
    power: float = Field(
        1.0, gt=0, le=1, description="p of log p = -w E^p / p, in (0, 1]; 0.25 is the code's ghuber"
    )


@dataclass(frozen=True)
class AWM(ImageObjective):
    """Clipped surrogate on the flow-matching loss at fresh points, averaged over them."""

    options: AWMOptions
    needs: ClassVar[frozenset[str]] = frozenset()
    clips = "latent^2, of errors"
    fresh: ClassVar[bool] = True

    def points(self, segment: ImageSegment, scheduler: Scheduler, keys: Sequence[Key]) -> Points:
        return fresh_points(segment, scheduler, keys, self.options)

    def count(self, stored: int) -> int:
        return self.options.times

    def log_ratio(self, points: Points, v: Tensor) -> Tensor:
        lower, power = gain(points, v), self.options.power
        if power == 1:
            return self._weight(points) * lower
        old = old_error(points) + FLOOR
        rest = (-lower / old).clamp(min=SMALLEST_REST - 1).log1p()
        return -self._weight(points) * old**power * (power * rest).expm1() / power

    def _weight(self, points: Points) -> Tensor:
        return points.t ** EXPONENTS[self.options.weighting]

    def clip_range(self, latent_elements: int) -> float:
        return self.options.clip_range

    def trust_radius(self, points: Points) -> Tensor:
        # By a small gain the log-ratio moves w E_old^(p - 1) times as much.
        slope = (old_error(points) + FLOOR) ** (self.options.power - 1)
        return gain_radius(points, self.options.clip_range / (self._weight(points) * slope))

    def loss(
        self,
        points: Points,
        velocities: Mapping[str, Tensor],
        advantages: Tensor,
        rewards: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        v = velocities["current"]
        values, metrics = clipped_surrogate(
            self.log_ratio(points, v), advantages, self.options.clip_range
        )
        error = mean_square(v.detach() - target(points))
        return values, {**metrics, "matching_error": error}

    def weights(self, mask: Tensor) -> Tensor:
        return mask.float()


def build(options: AWMOptions) -> AWM:
    return AWM(options)


PROVIDER = Provider(
    name="awm",
    options=AWMOptions,
    build=build,
    summary="advantage-weighted flow matching at freshly noised points, under PPO's clip",
    cite="AWM arXiv 2509.25050",
)
