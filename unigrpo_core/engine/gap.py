"""The gap between sampler and trainer, measured before the first update of every rollout.

The trainer's values are compared with what was stored at sampling, never with themselves; only
when they agree are they taken as the old values. A second replay of one micro-batch shows how far
the trainer agrees with itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unigrpo_core.errors import UserError
from unigrpo_core.interfaces import ImageObjective
from unigrpo_core.records import Points

TEXT_MEAN = {"float32": 1e-5, "bf16": 0.02}
TEXT_MAX = {"float32": 1e-4, "bf16": math.inf}
TEXT_RARE = 1e-3
"""The share of a rollout's tokens, or one token, that may be beyond TEXT_MAX, up to TEXT_RARE_MAX:
where a layer happens to be badly conditioned it amplifies rounding, and a long run meets such a
token. Ten times the limit is still a two-hundredth of the text's clip."""

TEXT_RARE_MAX = {"float32": 1e-3, "bf16": math.inf}
IMAGE_MAX = 1e-6
CLIP_SHARE = 0.05  # of the clip range: float32's image gap, and the trainer's own
RADIUS_SHARE = 0.25  # of the clip radius: bf16's rms shift of the mean


@dataclass
class Gap:
    """Accumulates the figures of one rollout."""

    precision: str
    text_sum: float = 0.0
    text_count: int = 0
    text_max: float = 0.0
    text_beyond: int = 0  # tokens beyond TEXT_MAX
    image_max: float = 0.0
    image_limit: float = math.inf
    radius_max: float = 0.0  # rms shift of the mean over the clip radius
    own_max: float = 0.0
    own_limit: float = math.inf
    by_time: dict[float, float] = field(default_factory=dict)

    def text(self, logps: Tensor, stored: Tensor, mask: Tensor) -> None:
        """The trainer's log-probs against the sampler's, [B, L]."""
        difference = (logps - stored).abs()[mask]
        self.text_sum += float(difference.double().sum())
        self.text_count += difference.numel()
        self.text_max = _largest(self.text_max, difference)
        self.text_beyond += int((difference > TEXT_MAX[self.precision]).sum())

    def image(self, objective: ImageObjective, points: Points, v: Tensor) -> None:
        """The trainer's guided velocities [B, K, *] against the stored transition means."""
        ratio = objective.log_ratio(points, v).abs()
        clip = objective.clip_range(math.prod(points.x_t.shape[2:]))
        self.image_max = _largest(self.image_max, ratio)
        self.image_limit = min(IMAGE_MAX, CLIP_SHARE * clip)
        shift = (points.transition(v).mean - points.old_mean).flatten(2)
        radius = objective.trust_radius(points)
        self.radius_max = _largest(self.radius_max, shift.square().mean(2).sqrt() / radius)
        for time in torch.unique(points.t).tolist():
            self.by_time[time] = _largest(self.by_time.get(time, 0.0), ratio[points.t == time])

    def own(self, objective: ImageObjective, points: Points, v: Tensor, again: Tensor) -> None:
        """Two replays of the same micro-batch."""
        difference = objective.log_ratio(points, v) - objective.log_ratio(points, again)
        self.own_max = _largest(self.own_max, difference.abs())
        self.own_limit = CLIP_SHARE * objective.clip_range(math.prod(points.x_t.shape[2:]))

    @property
    def text_mean(self) -> float:
        return self.text_sum / max(1, self.text_count)

    def metrics(self) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.text_count:
            found |= {"gap/text_mean": self.text_mean, "gap/text_max": self.text_max}
            found["gap/text_beyond"] = float(self.text_beyond)
        if self.by_time:
            found |= {
                "gap/image_log_ratio": self.image_max,
                "gap/image_radius_share": self.radius_max,
                "gap/trainer_twice": self.own_max,
            }
        return found

    def problems(self) -> dict[str, str]:
        """What is beyond its limit: "text", "image" or "twice", each with its figures."""
        found: dict[str, str] = {}
        for kind, name, got, limit in self._bounds():
            if not got <= limit:
                said = f"{name} is {got:.2e}, allowed {limit:.2e}"
                found[kind] = f"{found[kind]}; {said}" if kind in found else said
        return found

    def error(self, problems: Mapping[str, str], causes: Sequence[str]) -> UserError:
        """What stops the run where sampler and trainer disagree beyond the limits."""
        times = "".join(
            f"\n  t = {time:.4f}: image log-ratio {worst:.2e}"
            for time, worst in sorted(self.by_time.items(), reverse=True)
        )
        likely = "".join(f"\nlikely cause: {cause}" for cause in causes)
        return UserError(
            "sampler and trainer disagree, so ratios would be noise: "
            + "; ".join(problems.values())
            + times
            + likely
        )

    def _bounds(self) -> list[tuple[str, str, float, float]]:
        rare = self.text_beyond <= max(1.0, TEXT_RARE * self.text_count)
        text_max = (TEXT_RARE_MAX if rare else TEXT_MAX)[self.precision]
        bounds = [
            ("text", "mean |delta log p| of text", self.text_mean, TEXT_MEAN[self.precision]),
            ("text", "max |delta log p| of text", self.text_max, text_max),
            ("twice", "the trainer's own image log-ratio, twice,", self.own_max, self.own_limit),
        ]
        if self.precision == "float32":
            worst = ("image", "max |log-ratio| of images", self.image_max, self.image_limit)
        else:
            share = "rms shift of the mean, in clip radii"
            worst = ("image", share, self.radius_max, RADIUS_SHARE)
        return [*bounds, worst]


def _largest(before: float, values: Tensor) -> float:
    """The larger of a figure and the largest value; NaN wins, so that it cannot hide."""
    if not values.numel():
        return before
    largest = float(values.max())
    return largest if math.isnan(largest) or largest > before else before


def finite(name: str, value: Tensor) -> None:
    """Stops the run at a value that is not finite.

    Raises:
        UserError: naming what is not.
    """
    if not bool(torch.isfinite(value).all()):
        raise UserError(f"{name} is not finite; lower the learning rate, or look at the rewards")
