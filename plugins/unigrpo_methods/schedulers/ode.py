"""Deterministic Euler sampling of a flow-matching model.

Paper
    Flow matching (arXiv 2210.02747).

Mathematics
    dx = v dt from t = 1 down to t = 0; a step is x_t + v (t_next - t).

Convention
    Every transition is a point mass (std 0), so nothing can be trained on it by a ratio; a positive
    noise level is refused rather than ignored.

Deviations and readings
    1. None.
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


class ODEOptions(grids.GridOptions):
    """Options of the deterministic sampler; steps belong to the recipe's slot."""


@dataclass(frozen=True)
class ODE(Scheduler):
    """Euler steps of the probability-flow ODE."""

    options: ODEOptions
    stochastic: ClassVar[bool] = False

    def times(self, steps: int, shift: float) -> Tensor:
        return grids.times(self.options, steps, shift)

    def plain_times(self, steps: int, shift: float) -> list[float]:
        return grids.plain_times(self.options, steps, shift)

    def transition(
        self, v: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, noise_level: Tensor
    ) -> GaussianTransition:
        """The Euler step.

        Raises:
            ValueError: a noise level is not 0.
        """
        if (noise_level != 0).any():
            raise ValueError(
                "the scheduler 'ode' has no noise: it takes noise level 0 only, got "
                f"{noise_level.abs().max().item():g} (for stochastic steps use 'flow_sde')"
            )
        std = grids.per_point(noise_level, x_t)
        return GaussianTransition(grids.euler(v, x_t, t, t_next), std)


def build(options: ODEOptions) -> ODE:
    return ODE(options)


PROVIDER = Provider(
    name="ode",
    options=ODEOptions,
    build=build,
    summary="deterministic Euler steps; no step can be trained on",
    cite="Flow matching arXiv 2210.02747",
)
