"""What the objectives on the sampler's stochastic steps share: points, log-ratios, bounds.

Mathematics
    A trained step is Gaussian, x_next ~ N(mu, std^2 I). With delta = mu - mu_old and means taken
    over the d latent elements,

        plain      log r  = the transition's own, in the scheduler's unit
        RatioNorm  log r~ = mean(delta (x_next - mu_old)) / std.

Convention
    RatioNorm's log-ratio is that of the step's standard normal noise, whatever the scheduler's
    unit, and a drift of mu by a fixed rms moves it by that rms / sqrt(d). Its bound may therefore
    be given as ``clip_radius``, the rms itself: c = clip_radius / sqrt(d).
    A plain ratio's bound counts what the scheduler's log-ratio counts: ``clip_unit`` states which.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Self

from pydantic import model_validator

from unigrpo_core.errors import UserError
from unigrpo_core.interfaces import Scheduler
from unigrpo_core.plugin import Field, Options
from unigrpo_core.records import ImageSegment, Points, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from unigrpo_core.records import Transition

PAPER_RADIUS = 5.1e-4


class RatioOptions(Options):
    ratio_norm: bool = Field(False, description="take Eq 5's RatioNorm in place of the plain ratio")
    clip_range: float | None = Field(
        None, gt=0, description="bound c on |ratio - 1| of a step, > 0 (no unit); absolute"
    )
    clip_radius: float | None = Field(
        None,
        gt=0,
        description="with ratio_norm: c = clip_radius / sqrt(latent elements), > 0, in latent "
        f"units (rms drift of the mean); {PAPER_RADIUS} if neither bound is given",
    )
    clip_unit: Unit = Field(
        "nats",
        description='what the log of a plain ratio counts, and so its clip_range: "nats", or '
        '"latent^2" under a scheduler that leaves the variance out (cps)',
    )

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if self.clip_range is not None and self.clip_radius is not None:
            raise ValueError("clip_range and clip_radius are two ways to say one bound; give one")
        if not self.ratio_norm and self.clip_radius is not None:
            raise ValueError("clip_radius needs ratio_norm = true; a plain ratio takes clip_range")
        if not self.ratio_norm and self.clip_range is None:
            raise ValueError("clip_range is required, unless ratio_norm = true (then clip_radius)")
        if self.ratio_norm and self.clip_unit != "nats":
            raise ValueError(
                f'clip_unit = "{self.clip_unit}" is for a plain ratio; with ratio_norm = true the '
                "log-ratio is the same under every scheduler: leave it out"
            )
        return self

    @property
    def unit(self) -> Unit | None:
        """The unit of the bound, where it depends on the scheduler's."""
        return None if self.ratio_norm else self.clip_unit

    @property
    def clips(self) -> str:
        """What the bound counts, and of what."""
        return "latent, of drifts" if self.ratio_norm else f"{self.clip_unit}, of ratios"


def segment_points(segment: ImageSegment, scheduler: Scheduler) -> Points:
    """The stored steps of the sampler, [E, K].

    Raises:
        UserError: one of them has no noise, so no ratio.
    """
    points = Points(
        x_t=segment.x_t,
        t=segment.t,
        t_next=segment.t_next,
        noise_level=segment.noise_level,
        x_next=segment.x_next,
        old_mean=segment.old_mean,
        kernel=scheduler.transition,
    )
    # std does not depend on velocity and latents: any will do.
    any_latents = segment.t[..., None]
    std = scheduler.transition(
        any_latents, any_latents, segment.t, segment.t_next, segment.noise_level
    ).std
    still = (std.flatten(2) == 0).any(2)
    if still.any():
        t, t_next = segment.t[still][0].item(), segment.t_next[still][0].item()
        raise UserError(
            f"the step from t = {t:.4g} to {t_next:.4g} is to be trained, and it has no noise "
            "under image.scheduler, so it has no ratio: leave it out of image.window"
        )
    return points


def ratio_norm(points: Points, transition: Transition) -> Tensor:
    """RatioNorm's log-ratio [B, K]."""
    noise = (points.x_next - points.old_mean) / transition.std
    return ((transition.mean - points.old_mean) * noise).flatten(2).mean(2)


def log_ratio(options: RatioOptions, points: Points, v: Tensor) -> Tensor:
    """The plain or RatioNorm's log-ratio [B, K]."""
    transition = points.transition(v)
    if options.ratio_norm:
        return ratio_norm(points, transition)
    return transition.log_ratio(points.x_next, points.old_mean)


def bound(clip_range: float | None, clip_radius: float | None, latent_elements: int) -> float:
    """c of whichever bound is given; of the paper's radius if none is."""
    if clip_range is not None:
        return clip_range
    return (clip_radius or PAPER_RADIUS) / sqrt(latent_elements)


def trust_radius(points: Points, clip_range: float, *, ratio_norm: bool) -> Tensor:
    """[B, K]: the rms shift of the mean at which the log-ratio's spread is the clip range.

    The noise makes the log-ratio of a drift vary by rms / sqrt(d), over the unit shift if plain.
    """
    radius = clip_range * sqrt(points.x_t.shape[2:].numel())
    if ratio_norm:
        return points.t.new_full(points.t.shape, radius)
    # The unit shift does not depend on the velocity: any will do.
    return radius * points.transition(points.x_t).unit_shift.flatten(2).mean(2)
