"""DanceGRPO's stochastic sampler: noise of a constant rate.

Paper
    DanceGRPO (arXiv 2505.07818); its code for FLUX.

Mathematics
    Paths are x_t = (1 - t) data + t noise, v = noise - data. The SDE of ``flow_sde`` with a
    constant sigma_t = eta, the noise level:

        dx = [v - eta^2 / 2 score(x)] dt + eta dw,
        score(x) = -(x - (1 - t) x0) / t^2 = -(x + (1 - t) v) / t,   x0 = x - t v.

    One Euler-Maruyama step from t to t_next, dt = t_next - t < 0, is the Gaussian

        mean = x (1 + eta^2 / (2 t) dt) + v (1 + eta^2 (1 - t) / (2 t)) dt
        std  = eta sqrt(-dt).

Convention
    Marginals: those of the ODE, for an exact v and in the limit of small steps; means are exact,
    and stds, from t = 1 down to t = 0, up to an error that vanishes as 1 / T. For a learned v only
    as far as it is the true expectation.
    Noise 0: mean is exactly the Euler step x + v dt and std exactly 0; points of both kinds may be
    mixed in a batch.
    At t = 1 nothing is singular. A last step that is stochastic leaves noise of std eta sqrt(t) on
    the final latents, which nothing removes (.15 at eta = .3, t = .25); leave it out of the window
    if that is too much.
    x_t, t, t_next and noise_level are float32, and so is all arithmetic, also for a bfloat16 v.

Deviations and readings
    1. std includes sqrt(-dt), so a transition is complete.
    2. DanceGRPO makes every step stochastic and trains a random share of .6 of them; here steps
       outside the window follow the ODE. Its choice of steps is the window ``scattered``.
    3. Its images of one prompt share their initial noise: noise_scope = "prompt".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from unigrpo_core.interfaces import Scheduler
from unigrpo_core.plugin import Provider
from unigrpo_methods.schedulers import grids
from unigrpo_methods.schedulers.gaussian import GaussianTransition

if TYPE_CHECKING:
    from torch import Tensor


class DanceSDEOptions(grids.GridOptions):
    """Options of the stochastic sampler; steps and noise level belong to the recipe's slot."""


@dataclass(frozen=True)
class DanceSDE(Scheduler):
    """Euler-Maruyama steps of the SDE above."""

    options: DanceSDEOptions
    stochastic: ClassVar[bool] = True

    def times(self, steps: int, shift: float) -> Tensor:
        return grids.times(self.options, steps, shift)

    def plain_times(self, steps: int, shift: float) -> list[float]:
        return grids.plain_times(self.options, steps, shift)

    def transition(
        self, v: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, noise_level: Tensor
    ) -> GaussianTransition:
        dt = t_next - t
        rate = noise_level.square() / (2 * t)
        of_x = grids.per_point(1 + rate * dt, x_t)
        of_v = grids.per_point((1 + rate * (1 - t)) * dt, x_t)
        std = noise_level * (-dt).sqrt()
        return GaussianTransition(x_t * of_x + v * of_v, grids.per_point(std, x_t))


def build(options: DanceSDEOptions) -> DanceSDE:
    return DanceSDE(options)


PROVIDER = Provider(
    name="dance_sde",
    options=DanceSDEOptions,
    build=build,
    summary="DanceGRPO's SDE, noise of a constant rate; Euler at noise level 0",
    cite="DanceGRPO arXiv 2505.07818",
)
