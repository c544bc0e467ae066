"""Coefficients-preserving sampling: a share of the predicted noise is exchanged for fresh noise.

Paper
    Coefficients-Preserving Sampling (arXiv 2509.05952), and its code in Flow-GRPO's repository.

Mathematics
    Paths are x_t = (1 - t) data + t noise, v = noise - data, so that x0 = x - t v and x1 = x +
    (1 - t) v are what v predicts of data and noise. With the noise level eta in [0, 1],

        mean = (1 - t_next) x0 + t_next cos(eta pi / 2) x1
             = x (1 - k) + v (dt - k (1 - t)),   k = t_next (1 - cos(eta pi / 2)), dt = t_next - t
        std  = t_next sin(eta pi / 2),

    so the coefficients of the noise keep their sum of squares, t_next^2. The log-ratio leaves the
    variance out: log p = -mean((x_next - mean)^2) over the latent elements, and with delta = mean -
    old_mean its difference is mean(delta (2 (x_next - old_mean) - delta)), in squared latent units.

Convention
    Unit: a drift of the mean by an rms of 1 / (2 std) spreads a log-ratio over the noise as 1 does
    in nats, so that is ``unit_shift``: a clip range in nats does not carry over.
    Marginals: means are exact. Where data are a point, so is every marginal, for any number of
    steps and noise level. Elsewhere x1, being an expectation, has less than the noise's variance,
    and where all steps are stochastic x_t is too narrow, also in the limit of small steps: the
    exchange is per step, not per time. With c = cos(eta pi / 2), and V the true variance at t, that
    limit is

        variance = V (1 + c) / (2 - (1 - c) t^2 / V),

    at t = 0 V (1 + c) / 2 (.65 V at eta = .8). It is approached as 1 / T, at t = 0 as T^-2/3.
    Noise 0: mean is exactly the Euler step x + v dt and std exactly 0; points of both kinds may be
    mixed in a batch.
    At t = 1 nothing is singular. The last step, to t_next = 0, has no noise at any level (mean x0,
    std 0): it cannot be trained, and objectives refuse it; leave it out of the window.
    x_t, t, t_next and noise_level are float32, and so is all arithmetic, also for a bfloat16 v.

Deviations and readings
    1. The log-ratio is evaluated as the product above, not as a difference (see ``gaussian``).
    2. RatioNorm divides by std whatever the scheduler, so it is mean(delta (x_next - old_mean)) /
       std here too.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import TYPE_CHECKING, ClassVar

from unigrpo_core.errors import UserError
from unigrpo_core.interfaces import Scheduler
from unigrpo_core.plugin import Provider
from unigrpo_core.records import Transition, Unit
from unigrpo_methods.schedulers import grids

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class DistanceTransition(Transition):
    """N(mean, std^2 I), whose log-ratio is that of the squared distances alone."""

    mean: Tensor  # float32 [B, K, *]
    std: Tensor  # float32 [B, K, 1, ...]

    def log_ratio(self, x_next: Tensor, old_mean: Tensor) -> Tensor:
        delta = self.mean - old_mean
        return (delta * (2 * (x_next - old_mean) - delta)).flatten(2).mean(2)

    @property
    def unit_shift(self) -> Tensor:
        return 1 / (2 * self.std)


class CPSOptions(grids.GridOptions):
    """Options of the stochastic sampler; steps and noise level belong to the recipe's slot."""


@dataclass(frozen=True)
class CPS(Scheduler):
    """Steps to a mix of predicted data, predicted noise and fresh noise."""

    options: CPSOptions
    stochastic: ClassVar[bool] = True
    last_step: ClassVar[bool] = False
    most_noise: ClassVar[float] = 1.0
    unit: ClassVar[Unit] = "latent^2"

    def times(self, steps: int, shift: float) -> Tensor:
        return grids.times(self.options, steps, shift)

    def plain_times(self, steps: int, shift: float) -> list[float]:
        return grids.plain_times(self.options, steps, shift)

    def transition(
        self, v: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, noise_level: Tensor
    ) -> DistanceTransition:
        """The step.

        Raises:
            UserError: a noise level is above 1.
        """
        if (noise_level > 1).any():
            raise UserError(
                "the scheduler 'cps' takes noise levels from 0 to 1 (the share of the noise that "
                f"is exchanged is sin(noise_level pi / 2)); got {noise_level.max().item():g}: see "
                "image.scheduler.noise_level"
            )
        angle = noise_level * (pi / 2)
        # 1 - cos(angle) without cancellation; exactly 0 where the noise level is 0.
        lost = t_next * 2 * (angle / 2).sin().square()
        of_x = grids.per_point(1 - lost, x_t)
        of_v = grids.per_point((t_next - t) - lost * (1 - t), x_t)
        std = grids.per_point(t_next * angle.sin(), x_t)
        return DistanceTransition(x_t * of_x + v * of_v, std)


def build(options: CPSOptions) -> CPS:
    return CPS(options)


PROVIDER = Provider(
    name="cps",
    options=CPSOptions,
    build=build,
    summary="coefficients-preserving sampling; log-ratios without variance; Euler at noise level 0",
    cite="CPS arXiv 2509.05952",
)
