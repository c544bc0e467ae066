"""Points of the forward process, shared by the objectives that draw their own.

Mathematics
    For a sampled image x0, noise eps ~ N(0, I) and a time t,

        x_t = (1 - t) x0 + t eps,   v* = eps - x0 = (x_t - x0) / t,

    and flow matching's error of a velocity v is |v - v*|^2, a mean over the latent elements. With
    x0hat = x_t - t v it is |x0hat - x0|^2 / t^2. Of old weights with x0hat_old, delta = x0hat -
    x0hat_old, the error is lower by

        gain = |v_old - v*|^2 - |v - v*|^2 = mean(delta (2 (x0 - x0hat_old) - delta)) / t^2.

Convention
    The product is evaluated as it stands: two errors near 1 are never subtracted, so float32 holds
    a gain that is far below the rounding of either. It is exactly 0 where v is the old velocity.
    Times are stratified: an image's k-th of K comes from u in [k / K, (k + 1) / K), so that each
    image sees early and late ones, and all K together have the density asked for. They are at
    least .01, where the division by t leaves v* five digits of float32. All draws come from the
    image's key.
    The points are steps from t to 0 without noise, whatever the scheduler: their mean is x0hat.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING, Literal

from unigrpo_core.interfaces import Scheduler
from unigrpo_core.keys import Key, normals, uniforms
from unigrpo_core.plugin import Field, Options
from unigrpo_core.records import ImageSegment, Points
from unigrpo_methods.schedulers.grids import per_point

if TYPE_CHECKING:
    from torch import Tensor

LOWEST_TIME = 0.01


class FreshOptions(Options):
    """How an image's points are drawn."""

    times: int = Field(3, ge=1, description="points drawn per image, at least 1")
    density: Literal["uniform", "logit_normal"] = Field(
        "uniform",
        description="of the times: uniform on [0, 1), or the sigmoid of a standard normal",
    )
    shift: float = Field(
        1.0, gt=0, description="moves the times towards the noise: s t / (1 + (s - 1) t); 1 is off"
    )


def fresh_points(
    segment: ImageSegment, scheduler: Scheduler, keys: Sequence[Key], options: FreshOptions
) -> Points:
    """The points [E, K] of the images, one key each; ``old_mean`` is the image until the trainer
    puts the old weights' x0hat there."""
    import torch

    x0 = segment.latents
    count, axes = options.times, x0.shape[1:]
    u = uniforms([key.child("times") for key in keys], count, x0.device)
    u = (torch.arange(count, device=x0.device) + u) / count
    if options.density == "logit_normal":
        u = torch.special.ndtri(u).sigmoid()
    u = options.shift * u / (1 + (options.shift - 1) * u)
    t = u.clamp(min=LOWEST_TIME).to(x0.dtype)
    noise = normals([key.child("noise") for key in keys], (count, *axes), x0.device).to(x0.dtype)
    data = x0[:, None].expand_as(noise)
    share = per_point(t, noise)
    return Points(
        x_t=(1 - share) * data + share * noise,
        t=t,
        t_next=torch.zeros_like(t),
        noise_level=torch.zeros_like(t),
        x_next=data,
        old_mean=data,
        kernel=scheduler.transition,
    )


def target(points: Points) -> Tensor:
    """v* [B, K, *], the velocity that leads from the data to its noise."""
    return (points.x_t - points.x_next) / per_point(points.t, points.x_t)


def mean_square(values: Tensor) -> Tensor:
    """[B, K]: the mean of the squares of values [B, K, *] over the latent elements."""
    return values.square().flatten(2).mean(2)


def old_error(points: Points) -> Tensor:
    """[B, K]: flow matching's error of the old weights, in squared latent units."""
    return mean_square(points.x_next - points.old_mean) / points.t.square()


def gain(points: Points, v: Tensor) -> Tensor:
    """[B, K]: by how much the error of v [B, K, *] is lower than the old weights'; at most
    :func:`old_error`, and exactly 0 at their velocity."""
    delta = points.transition(v).mean - points.old_mean
    terms = delta * (2 * (points.x_next - points.old_mean) - delta)
    return terms.flatten(2).mean(2) / points.t.square()


def gain_radius(points: Points, change: Tensor | float) -> Tensor:
    """[B, K]: the rms shift s of the mean, in directions that know nothing of the residual R =
    x0 - x0hat_old, at which the gain of d elements spreads by ``change``: 2 s rms(R) / (sqrt(d)
    t^2), its delta^2 left aside, as small beside it. Infinite where there is no residual."""
    elements = points.x_t.shape[2:].numel()
    residual = mean_square(points.x_next - points.old_mean).sqrt()
    return change * sqrt(elements) * points.t.square() / (2 * residual)
