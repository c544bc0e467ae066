"""Inputs for the checks: keyed draws, points along trajectories, and a kernel to step with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unigrpo_core.interfaces import Scheduler
from unigrpo_core.keys import Key
from unigrpo_core.records import FlowStep, ImageSegment, Transition

AXES = ((7,), (2, 3, 4))
"""Latent axes ``*`` that checks try: a flat one and a grid."""


def normal(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal draws of the given shape; the name is their key."""
    return torch.from_numpy(Key(("conformance", name)).normal(shape)).to(dtype)


def uniform(name: str, *shape: int) -> Tensor:
    """Draws in [0, 1), float32 of the given shape; the name is their key."""
    count = torch.Size(shape).numel()
    drawn = Key(("conformance", "uniform", name)).uniform(count)
    return torch.from_numpy(drawn).float().reshape(shape)


def keys(count: int, name: str = "row") -> tuple[Key, ...]:
    """One key per row."""
    return tuple(Key(("conformance", name, row)) for row in range(count))


def wide(values: Tensor, latents: Tensor) -> Tensor:
    """Values [B, K] in a shape [B, K, 1, ...] that broadcasts over latents [B, K, *]."""
    return values.reshape(values.shape + (1,) * (latents.dim() - values.dim()))


# --- a kernel ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PlainTransition(Transition):
    """N(mean, std^2)."""

    mean: Tensor
    std: Tensor

    def log_ratio(self, x_next: Tensor, old_mean: Tensor) -> Tensor:
        delta = self.mean - old_mean
        terms = delta * (2 * (x_next - old_mean) - delta) / (2 * self.std.square())
        return terms.flatten(2).mean(2)

    @property
    def unit_shift(self) -> Tensor:
        return self.std


class PlainScheduler(Scheduler):
    """Euler steps with noise added: mean = x + v dt, std = noise level * sqrt(-dt). It keeps no
    marginals; it is what objectives and regularizers are checked over."""

    stochastic: ClassVar[bool] = True

    def times(self, steps: int, shift: float) -> Tensor:
        u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return shift * u / (shift * u + (1 - u))

    def transition(
        self, v: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, noise_level: Tensor
    ) -> PlainTransition:
        dt = t_next - t
        std = wide(noise_level * (-dt).sqrt(), x_t)
        return PlainTransition(x_t + v * wide(dt, x_t), std)


def flow_step(
    v: Tensor, v_anchor: Tensor, scheduler: Scheduler, noise_level: float = 0.7
) -> FlowStep:
    """What a regularizer sees at K times between .9 and .1, for velocities [B, K, *]."""
    rows, points = v.shape[:2]
    x_t = normal("x_t", *v.shape, dtype=v.dtype)
    t = torch.linspace(0.9, 0.2, points, dtype=v.dtype).expand(rows, points).clone()
    noise = torch.full_like(t, noise_level)
    return FlowStep(
        v=v,
        v_anchor=v_anchor,
        x_t=x_t,
        t=t,
        t_next=t - 0.1,
        transition=scheduler.transition(v, x_t, t, t - 0.1, noise),
        transition_anchor=scheduler.transition(v_anchor, x_t, t, t - 0.1, noise),
    )


def field(x_t: Tensor, t: Tensor) -> Tensor:
    """A velocity field: the velocities [B, K, *] of a policy at x_t and t [B, K]."""
    return torch.sin(3 * x_t) + wide(t, x_t)


def image_segment(
    scheduler: Scheduler,
    rows: int = 4,
    points: int = 3,
    axes: Sequence[int] = (2, 3, 4),
    dtype: torch.dtype = torch.float32,
    noise_level: float = 0.7,
) -> ImageSegment:
    """Images sampled by the velocities of :func:`field`, over steps from t = .9 to .3."""
    shape = (rows, points, *axes)
    t = torch.linspace(0.9, 0.5, points, dtype=dtype).expand(rows, points).clone()
    t_next, noise = t - 0.2, torch.full_like(t, noise_level)
    x_t = normal("x_t", *shape, dtype=dtype)
    transition = scheduler.transition(field(x_t, t), x_t, t, t_next, noise)
    x_next = transition.mean + transition.std * normal("noise", *shape, dtype=dtype)
    return ImageSegment(
        x_t=x_t,
        x_next=x_next,
        old_mean=transition.mean,
        t=t,
        t_next=t_next,
        noise_level=noise,
        latents=x_next[:, -1],
        images=uniform("images", rows, 3, 8, 8),
    )


def token_mask(rows: int = 4, length: int = 6) -> Tensor:
    """bool [B, L], padded on the right: rows of different lengths, the first one full."""
    lengths = torch.tensor([length, 1, *range(2, rows)])[:rows]
    return torch.arange(length) < lengths[:, None]


# --- gradients --------------------------------------------------------------------------------


def gradient_is_right(function: Callable[[Tensor], Tensor], point: Tensor) -> bool:
    """Whether autograd agrees with differences at a float64 point; what computes in float32
    whatever it is given is asked for fewer digits."""
    point = point.detach().double().requires_grad_()
    exact = function(point).dtype == torch.float64
    step, allowed = (1e-6, 1e-5) if exact else (1e-2, 2e-2)
    return torch.autograd.gradcheck(
        function, (point,), eps=step, atol=allowed, rtol=allowed, raise_exception=False
    )
