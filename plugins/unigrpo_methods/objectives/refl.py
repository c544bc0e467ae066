"""ReFL: the gradient of a differentiable reward, through the image as one step would finish it.

Paper
    ImageReward (arXiv 2304.05977), section 3 and Algorithm 1; section 4.2 and the public code of
    its authors for the settings.

Mathematics
    At a late step of the sampler, x0hat = x_t - t v, and with S the reward of the decoded x0hat,

        loss = -weight phi(S),   phi(S) = S, or min(S, ceiling) where a ceiling is given.

    The original's relu(2 - S) is 2 - min(S, 2). The gradient goes through S, the decoder and x0hat
    to v; x_t is a constant, so it does not go through the steps before.

Convention
    The points are the steps that the window chose, and for late ones it must say so: of T steps, a
    ``random`` window of size 1 in [3 T / 4, T) is nearest to the paper. They may be without noise;
    with noise, x0hat is still the velocity's own prediction. Neither advantage nor reward of the
    episode is read: what S is comes from the recipe's rewards, weighted and summed.
    There is no ratio and no clip. ``log_ratio``, by which sampler and trainer are compared, is the
    mean over the elements of the shift of the transition's mean, in latent units.

Deviations and readings
    1. The original is a model that predicts noise; x0hat is the same estimate of a flow.
    2. The original draws one step of the last 10 of 40 per batch and stops sampling there; here
       the window draws per rollout, and the rollout goes on to the end, since other objectives and
       the sheet want its image.
    3. The original's weight of 1e-3 stands beside a pre-training loss on real images of weight 1,
       which is not here (nor in the public code); a regularizer may take its place. The default
       here is 1.
    4. The ceiling of 2 is in units of ImageReward, standardised; without one unless it is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from unigrpo_core.interfaces import ImageObjective, Scheduler
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Field, Options, Provider
from unigrpo_core.records import ImageSegment, Points
from unigrpo_methods.schedulers.grids import per_point

if TYPE_CHECKING:
    from torch import Tensor


class ReFLOptions(Options):
    weight: float = Field(1.0, gt=0, description="what the loss is multiplied by, > 0 (no unit)")
    ceiling: float | None = Field(
        None,
        description="the score above which there is no gradient, in its units (the authors' "
        "code has 2); none if it is not given",
    )


@dataclass(frozen=True)
class ReFL(ImageObjective):
    """Minus the score of the estimated image, averaged over the window's steps."""

    options: ReFLOptions
    needs: ClassVar[frozenset[str]] = frozenset({"score"})

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
        return (points.transition(v).mean - points.old_mean).flatten(2).mean(2)

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
        assert points.score is not None, "an objective that needs a score is given one"
        data = points.x_t - per_point(points.t, points.x_t) * velocities["current"]
        score = points.score(data)
        kept = score if self.options.ceiling is None else score.clamp(max=self.options.ceiling)
        return -self.options.weight * kept, {"score": score.detach()}

    def weights(self, mask: Tensor) -> Tensor:
        return mask.float()


def build(options: ReFLOptions) -> ReFL:
    return ReFL(options)


PROVIDER = Provider(
    name="refl",
    options=ReFLOptions,
    build=build,
    summary="gradient of a differentiable reward, of the image as estimated at the window's steps",
    cite="ImageReward (ReFL) arXiv 2304.05977 Algorithm 1",
)
