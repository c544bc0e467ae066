"""Flow-DPPO: steps that left the trust region are masked by their divergence, not by their ratio.

Paper
    Flow-DPPO (arXiv 2606.11025), Eqs 12, 14, 17 and 18.

Mathematics
    With delta = mu - mu_old and means over the d latent elements,

        log r = mean(delta (2 (x_next - mu_old) - delta)) / (2 std^2),
        D     = mean(delta^2) / (2 std^2),

    J = 1/G sum_i 1/|T_SDE| sum_t M r A_i, where M = 0 if D > threshold and the update would move
    further away (A_i > 0 and r > 1, or A_i < 0 and r < 1), else 1. M is a constant: a masked point
    has no gradient and value 0. Values are -M r A.

Convention
    D is exact, not a sample, so the noise of a step does not decide whether it is masked. D reaches
    the threshold at an rms drift of std sqrt(2 threshold), whatever d: that is the trust radius.
    The noise then spreads log r by sqrt(2 threshold / d), which takes the clip range's part where
    the gap between sampler and trainer is measured.
    ``clip_fraction`` is 1 where a point is masked; ``divergence`` is D.

Deviations and readings
    1. Eq 14 has a squared norm; D is a mean, as the log-ratio is, and as in UniRL's code. The
       default threshold is the paper's for its runs, 1e-7; with CPS it has 1e-6, and UniRL 1e-5,
       which the paper finds less stable.
    2. Algorithm 1 writes D without the variance; Eqs 14 to 16 have it, also for CPS.
    3. The ratio is that of the densities under every scheduler (Eq 12), also where the scheduler's
       own log-ratio leaves the variance out (``cps``). So there is no unit to state.
    4. The term -beta KL of Eq 17 is the regularizer ``latent_kl``.
    5. The log-ratio is limited to +-20 (see ``surrogate``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, ClassVar

from unigrpo_core.interfaces import ImageObjective, Scheduler
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Field, Options, Provider
from unigrpo_core.records import ImageSegment, Points
from unigrpo_methods.objectives import steps
from unigrpo_methods.objectives.surrogate import ratio_change
from unigrpo_methods.schedulers.gaussian import GaussianTransition

if TYPE_CHECKING:
    from torch import Tensor


class FlowDPPOOptions(Options):
    threshold: float = Field(
        1e-7,
        gt=0,
        allow_inf_nan=False,
        description="divergence of a step per latent element beyond which it is masked, > 0, nats",
    )


@dataclass(frozen=True)
class FlowDPPO(ImageObjective):
    """Per-step policy gradient under the divergence mask, averaged over the trained steps."""

    options: FlowDPPOOptions
    needs: ClassVar[frozenset[str]] = frozenset()
    clips = "nats, of KL"

    def points(self, segment: ImageSegment, scheduler: Scheduler, keys: Sequence[Key]) -> Points:
        return steps.segment_points(segment, scheduler)

    def log_ratio(self, points: Points, v: Tensor) -> Tensor:
        transition = points.transition(v)
        gaussian = GaussianTransition(transition.mean, transition.std)
        return gaussian.log_ratio(points.x_next, points.old_mean)

    def clip_range(self, latent_elements: int) -> float:
        return sqrt(2 * self.options.threshold / latent_elements)

    def trust_radius(self, points: Points) -> Tensor:
        # std does not depend on the velocity: any will do.
        std = points.transition(points.x_t).std
        return sqrt(2 * self.options.threshold) * std.flatten(2).mean(2)

    def loss(
        self,
        points: Points,
        velocities: Mapping[str, Tensor],
        advantages: Tensor,
        rewards: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        v = velocities["current"]
        change = ratio_change(self.log_ratio(points, v))
        transition = points.transition(v.detach())
        moved = (transition.mean - points.old_mean) / transition.std
        divergence = moved.square().flatten(2).mean(2) / 2
        masked = (change.detach() * advantages > 0) & (divergence > self.options.threshold)
        values = -(advantages + change * advantages).masked_fill(masked, 0)
        return values, {
            "clip_fraction": masked.to(values.dtype),
            "ratio_deviation": change.detach().abs(),
            "divergence": divergence,
        }

    def weights(self, mask: Tensor) -> Tensor:
        return mask.float()


def build(options: FlowDPPOOptions) -> FlowDPPO:
    return FlowDPPO(options)


PROVIDER = Provider(
    name="flow_dppo",
    options=FlowDPPOOptions,
    build=build,
    summary="policy gradient on the stochastic steps, masked by the exact divergence; no clip",
    needs=("std",),
    cite="Flow-DPPO arXiv 2606.11025",
)
