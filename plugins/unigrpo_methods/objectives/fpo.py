"""FPO: PPO's clip on a ratio made of flow-matching losses.

Paper
    Flow Matching Policy Gradients (arXiv 2507.21053) and the public code of its authors. UniGRPO
    (arXiv 2603.23500) compares with it, beside a GRPO on the text, as UniFPO, which collapsed.

Mathematics
    The flow-matching loss bounds the log-likelihood of an image from below, up to a constant (its
    ELBO). With l = |v - v*|^2 or, with ``error`` "noise", |eps - epshat|^2 = (1 - t)^2 |v - v*|^2
    (epshat = x_t + (1 - t) v), means over the latent elements,

        r = exp(l_old - l),   loss = -min(r A, clip(r, 1 - c, 1 + c) A),

    at fresh points (see ``fresh``) that old and current weights share.

Convention
    l_old - l is evaluated as a product (see ``fresh.gain``), exactly 0 at the old velocity; there
    the gradient of the loss is that of A l. At error "velocity" it is ``awm`` at its defaults, with
    another clip range.
    Unit: l is in squared latent units, not in nats: c = .05 acts where the error of a point has
    moved by about .05 of the latents' variance.

Deviations and readings
    1. The paper averages l over an action's samples of (t, eps) before exp, and so one ratio is
       clipped per action. Here a point has a ratio of its own, as with the code's
       average_losses_before_exp off: both have the same gradient at r = 1, but the mean of exp
       is at least the exp of the mean, and a clip acts on points, more often and more weakly.
    2. c = .05 and, in the code, 8 samples per action are those of the control tasks; here c = .05
       too, and 3 points unless ``times`` says more.
    3. The code's default error is that of the noise; here the velocity's, the paper's loss and
       what the models are trained with.
    4. l is a mean over the elements, as in the code, not the sum that an ELBO has.
    5. The log-ratio is limited to +-20 (see ``surrogate``), the code's per-sample one to +-3.
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
    target,
)
from unigrpo_methods.objectives.surrogate import clipped_surrogate

if TYPE_CHECKING:
    from torch import Tensor


class FPOOptions(FreshOptions):
    clip_range: float = Field(
        0.05,
        gt=0,
        description="bound c on |ratio - 1| of a point, > 0; its log is in squared latent units",
    )
    error: Literal["velocity", "noise"] = Field(
        "velocity", description="of which prediction the squared error stands for the ELBO"
    )


@dataclass(frozen=True)
class FPO(ImageObjective):
    """Clipped surrogate on ELBO ratios at fresh points, averaged over them."""

    options: FPOOptions
    needs: ClassVar[frozenset[str]] = frozenset()
    clips = "latent^2, of errors"
    fresh: ClassVar[bool] = True

    def points(self, segment: ImageSegment, scheduler: Scheduler, keys: Sequence[Key]) -> Points:
        return fresh_points(segment, scheduler, keys, self.options)

    def count(self, stored: int) -> int:
        return self.options.times

    def log_ratio(self, points: Points, v: Tensor) -> Tensor:
        return self._weight(points) * gain(points, v)

    def _weight(self, points: Points) -> Tensor:
        """[B, K]: what the velocity's squared error is multiplied by."""
        if self.options.error == "noise":
            return (1 - points.t).square()
        return points.t.new_ones(points.t.shape)

    def clip_range(self, latent_elements: int) -> float:
        return self.options.clip_range

    def trust_radius(self, points: Points) -> Tensor:
        return gain_radius(points, self.options.clip_range / self._weight(points))

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


def build(options: FPOOptions) -> FPO:
    return FPO(options)


PROVIDER = Provider(
    name="fpo",
    options=FPOOptions,
    build=build,
    summary="PPO's clip on exp of the change in flow-matching loss at freshly noised points",
    cite="Flow Matching Policy Gradients arXiv 2507.21053",
)
