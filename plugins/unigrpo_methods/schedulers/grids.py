"""The time grids and the Euler step that the schedulers share.

Every grid has T + 1 points for T model calls, falls from exactly 1 (noise) to exactly 0 (data) and
is shifted by s towards the noise: shifted(u) = s u / (1 + (s - 1) u).

``linear``
    u = linspace(1, 0, T + 1), shifted once. It equals diffusers'
    ``set_timesteps(sigmas=linspace(1, 1/T, T))`` with static ``shift`` s.
``diffusers``
    ``set_timesteps(T)`` of diffusers' FlowMatchEulerDiscreteScheduler with static ``shift`` s and
    1,000 training timesteps, which shifts twice: u = linspace(1, shifted(1/1000), T), shifted
    again, then 0. At T = 10, s = 3 the last time before 0 is .009 where ``linear`` has .25.

With a terminal e, as ``shift_terminal`` of diffusers' scheduler, the shifted times t are then
stretched from 1 so that t_last, the last before 0, is e: 1 - (1 - t) (1 - e) / (1 - t_last). The
shift moves those between. At T = 1 there is no time between the ends, and nothing to stretch.
"""

from __future__ import annotations

from ctypes import c_float
from typing import TYPE_CHECKING, Literal

from unigrpo_core.plugin import Field, Options

if TYPE_CHECKING:
    from torch import Tensor

TRAIN_TIMESTEPS = 1000

Grid = Literal["linear", "diffusers"]


class GridOptions(Options):
    grid: Grid = Field(
        "linear",
        description='how times are spaced: "linear" (evenly, shifted once) or "diffusers" '
        "(as diffusers' set_timesteps(T), shifted twice)",
    )
    shift_terminal: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="the last time before 0, to which the shifted times are stretched, as "
        "diffusers' shift_terminal; not stretched when absent",
    )


def times(options: GridOptions, steps: int, shift: float) -> Tensor:
    """float64 [steps + 1], falling from 1 to 0.

    Raises:
        ValueError: fewer than one step, or a shift that is not positive.
    """
    import torch

    if steps < 1:
        raise ValueError(f"a time grid needs at least 1 step; got {steps}")
    if not shift > 0:
        raise ValueError(f"a timestep shift is positive (1: none); got {shift}")
    if options.grid == "linear":
        found = _shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)
    else:
        last = _shifted(torch.tensor(1 / TRAIN_TIMESTEPS, dtype=torch.float64), shift).item()
        sigmas = _shifted(torch.linspace(1, last, steps, dtype=torch.float64), shift)
        found = torch.cat([sigmas, sigmas.new_zeros(1)])
    if options.shift_terminal is not None and steps > 1:
        found[:-1] = 1 - (1 - found[:-1]) * ((1 - options.shift_terminal) / (1 - found[-2]))
    return found


def plain_times(options: GridOptions, steps: int, shift: float) -> list[float]:
    """The same times, up to rounding, without torch."""

    def shifted(u: float) -> float:
        return shift * u / (shift * u + (1 - u))

    if options.grid == "linear":
        sigmas = [shifted(1 - step / steps) for step in range(steps)]
    else:
        fall = (1 - shifted(1 / TRAIN_TIMESTEPS)) / max(1, steps - 1)
        sigmas = [shifted(1 - step * fall) for step in range(steps)]
    if options.shift_terminal is not None and steps > 1:
        stretch = (1 - options.shift_terminal) / (1 - sigmas[-1])
        sigmas = [1 - (1 - sigma) * stretch for sigma in sigmas]
    return [*sigmas, 0.0]


def float32(x: float) -> float:
    """The float32 number nearest to x."""
    return c_float(x).value


def _shifted(u: Tensor, shift: float) -> Tensor:
    # The same number as s u / (1 + (s - 1) u), but exactly 1 at u = 1 for every s.
    return shift * u / (shift * u + (1 - u))


def per_point(values: Tensor, latents: Tensor) -> Tensor:
    """Values [B, K] in a shape [B, K, 1, ...] that broadcasts over latents [B, K, *]."""
    return values.reshape(values.shape + (1,) * (latents.dim() - 2))


def euler(v: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """x_t + v (t_next - t): one Euler step of the probability-flow ODE dx = v dt."""
    return x_t + v * per_point(t_next - t, x_t)
