"""Flow-GRPO's stochastic sampler of a flow-matching model.

Paper
    UniGRPO (arXiv 2603.23500), Eq 3; Flow-GRPO (arXiv 2505.05470).

Mathematics
    Paths are x_t = (1 - t) data + t noise, v = noise - data. The ODE dx = v dt has the marginals
    p_t, and for any sigma_t >= 0 so does the SDE, run from t = 1 down to t = 0,

        dx = [v + sigma_t^2 / (2 t) (x + (1 - t) v)] dt + sigma_t dw,

    because x + (1 - t) v is the expected noise given x, and so -(x + (1 - t) v) / t the score of
    p_t. sigma_t = a sqrt(t / (1 - t)), with a the noise level. One Euler-Maruyama step from t to
    t_next, dt = t_next - t < 0, is the Gaussian

        mean = x (1 + sigma_t^2 / (2 t) dt) + v (1 + sigma_t^2 (1 - t) / (2 t)) dt
        std  = sigma_t sqrt(-dt).

Convention
    Marginals: those of the ODE, for an exact v and in the limit of small steps, and for a learned v
    only as far as it is the true expectation. A step keeps the mean exactly and the variance to
    first order in dt, but not near t = 1 (see below).
    Noise 0: mean is exactly the Euler step x + v dt and std exactly 0; points of both kinds may be
    mixed in a batch.
    At t = 1 sigma is infinite, so 1 - t in its denominator becomes 1 - t_next there. Whatever the
    grid, the first step is then x (1 - a^2 / 2) + v dt with std a, which inflates the variance of
    the pure noise by a factor of about 1 + a^4 / 4 (1.10 at a = .8).
    Near t = 1 sigma diverges: at T = 25, shift 3, a = .8 the second step has sigma 6.8, std .82.
    So the variance after k stochastic steps from t = 1 is too large by a factor 1 + e_k, which for
    large T does not depend on T,
        e_1 = a^4 / 4,   e_(k+1) = (1 - a^2 / (2 k))^2 e_k + a^4 / (2 k)^2,
    and for a = .8 is largest after the second step (1.15). At a fixed t below 1 the excess vanishes
    as T^-min(a^2, 1): slowly for a small a, which has little of it.
    x_t, t, t_next and noise_level are float32, and so is all arithmetic, also for a bfloat16 v.

Deviations and readings
    1. The paper leaves sigma_t open; its form, and the denominator at t = 1, are Flow-GRPO's.
    2. std includes sqrt(-dt), so a transition is complete: no other part of the project needs dt.
    3. T steps are T model calls. BAGEL's own sampler counts T grid points, so T - 1 calls.
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


class FlowSDEOptions(grids.GridOptions):
    """Options of the stochastic sampler; steps and noise level belong to the recipe's slot."""


@dataclass(frozen=True)
class FlowSDE(Scheduler):
    """Euler-Maruyama steps of the SDE above."""

    options: FlowSDEOptions
    stochastic: ClassVar[bool] = True

    def times(self, steps: int, shift: float) -> Tensor:
        return grids.times(self.options, steps, shift)

    def plain_times(self, steps: int, shift: float) -> list[float]:
        return grids.plain_times(self.options, steps, shift)

    def transition(
        self, v: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, noise_level: Tensor
    ) -> GaussianTransition:
        dt = t_next - t
        gap = (1 - t).where(t < 1, 1 - t_next)
        # rate = sigma^2 / (2 t), in which t cancels; 0 where the noise level is 0.
        rate = noise_level.square() / (2 * gap)
        of_x = grids.per_point(1 + rate * dt, x_t)
        of_v = grids.per_point((1 + rate * (1 - t)) * dt, x_t)
        std = noise_level * (t * -dt / gap).sqrt()
        return GaussianTransition(x_t * of_x + v * of_v, grids.per_point(std, x_t))


def build(options: FlowSDEOptions) -> FlowSDE:
    return FlowSDE(options)


PROVIDER = Provider(
    name="flow_sde",
    options=FlowSDEOptions,
    build=build,
    summary="Flow-GRPO's SDE with the marginals of the ODE; Euler at noise level 0",
    cite="UniGRPO arXiv 2603.23500 Eq 3; Flow-GRPO arXiv 2505.05470",
)
