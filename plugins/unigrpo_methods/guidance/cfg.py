"""Classifier-free guidance, optionally on an interval of times, and what BAGEL and Qwen-Image add.

Paper
    Classifier-free guidance (arXiv 2207.12598); guidance interval (arXiv 2404.07724). The arm
    "with CFG" of UniGRPO's Fig 4 (arXiv 2603.23500). The branch "image" and the rescaling are those
    of BAGEL's released sampler (arXiv 2505.14683); that of "channel_exact" is that of Qwen-Image's
    pipeline in diffusers 0.42 (arXiv 2508.02324).

Mathematics
    Where lo < t <= hi, with v_u the velocity without the prompt and without the thought (the branch
    "text"), and v_i the one without the thought and without input images (the branch "image"):

    a = v_u + scale (v - v_u),   b = v_i + image_scale (a - v_i),
    shrunk(x) = x min(1, max(renorm_min, |v| / (|x| + 1e-8)))

    renorm "none": b. "global": shrunk(b), norms over all of an image. "channel": shrunk(b), norms
    per token, over the last axis. "text_channel": b of shrunk(a), norms per token; b itself is not
    shrunk. "channel_exact": b |v| / (|b| + 1e-8), norms per token, which may also enlarge. At
    image_scale 1 there is no v_i, and b = a. Elsewhere: v.

Convention
    t is the shifted time the model sees. The bounds are compared in t's precision, so a bound and
    a time that are the same float32 number are equal. At scale 1 no point is guided, so no branch
    is computed, whatever the other options; at scale 0 the result is v_u.

Deviations and readings
    1. The scale of Fig 4's arm is not given; the default is Flow-GRPO's for BAGEL, 4.
    2. BAGEL's sampler takes its "global" norms over all images of a call; here they are an image's.
    3. BAGEL's sampler combines nothing at scale < 1. Here a scale below 1 interpolates, and the
       other options are refused with it.
    4. BAGEL's sampler rescales by default ("global", from 0); here nothing does unless asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

from pydantic import field_validator, model_validator

from unigrpo_core.interfaces import Guidance
from unigrpo_core.plugin import Field, Options, Provider
from unigrpo_methods.schedulers.grids import float32, per_point

if TYPE_CHECKING:
    from torch import Tensor


class CFGOptions(Options):
    scale: float = Field(
        4.0, ge=0, description="guidance scale, >= 0; 1 is off, 0 the unconditional velocity"
    )
    interval: tuple[float, float] = Field(
        (0.0, 1.0), description="guided where lo < t <= hi, t the shifted time, 0 <= lo < hi <= 1"
    )
    image_scale: float = Field(
        1.0, ge=1, description='scale against the branch "image", >= 1; 1 is off'
    )
    renorm: Literal["none", "global", "channel", "text_channel", "channel_exact"] = Field(
        "none",
        description="shrink the guided velocity to the conditional one's norm: never, per image, "
        "per token (the latents' last axis), or per token before image_scale acts; channel_exact: "
        "per token, enlarged too",
    )
    renorm_min: float = Field(
        0.0, ge=0, le=1, description="the smallest factor by which renorm shrinks, 0 to 1"
    )

    @field_validator("interval")
    @classmethod
    def _ordered(cls, interval: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError(
                f"interval must be [lo, hi] with 0 <= lo < hi <= 1; got {list(interval)}"
            )
        return interval

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.renorm in ("none", "channel_exact") and self.renorm_min:
            raise ValueError(
                f"renorm_min = {self.renorm_min} does nothing without a renorm that shrinks; "
                f"got renorm = {self.renorm!r}"
            )
        if self.scale < 1 and (self.image_scale > 1 or self.renorm != "none"):
            raise ValueError(
                f"image_scale and renorm act on a text guidance: scale must be at least 1; "
                f"got {self.scale}"
            )
        return self


@dataclass(frozen=True)
class CFG(Guidance):
    """Extrapolation from the unconditional to the conditional velocity."""

    options: CFGOptions
    branches: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        wanted = ("text", "image") if self.options.image_scale > 1 else ("text",)
        object.__setattr__(self, "branches", wanted)

    def active(self, t: Tensor) -> Tensor:
        low, high = self.options.interval
        return (t > low) & (t <= high) & (self.options.scale != 1)

    def guides(self, t: float) -> bool:
        low, high, time = (float32(x) for x in (*self.options.interval, t))
        return self.options.scale != 1 and low < time <= high

    def combine(self, v: Tensor, branches: Mapping[str, Tensor], t: Tensor) -> Tensor:
        renorm, unconditional = self.options.renorm, branches["text"]
        guided = unconditional + self.options.scale * (v - unconditional)
        if renorm == "text_channel":
            guided = self._rescaled(guided, v)
        if "image" in self.branches:
            thoughtless = branches["image"]
            guided = thoughtless + self.options.image_scale * (guided - thoughtless)
        if renorm in ("global", "channel", "channel_exact"):
            guided = self._rescaled(guided, v)
        return guided.where(per_point(self.active(t), v), v)

    def _rescaled(self, guided: Tensor, v: Tensor) -> Tensor:
        """``guided`` [B, K, *] with norms of at most v's, or of v's; a token is the last axis."""
        import torch

        renorm = self.options.renorm
        axes = [*range(2, v.dim())] if renorm == "global" else [-1]
        norm, wanted = (torch.linalg.vector_norm(x, dim=axes, keepdim=True) for x in (guided, v))
        factor: Tensor = wanted / (norm + 1e-8)
        if renorm != "channel_exact":
            factor = factor.clamp(self.options.renorm_min, 1.0)
        return guided * factor


def build(options: CFGOptions) -> CFG:
    return CFG(options)


PROVIDER = Provider(
    name="cfg",
    options=CFGOptions,
    build=build,
    summary="classifier-free guidance: one call more per guided step and unconditional context",
    cite="CFG arXiv 2207.12598; interval arXiv 2404.07724; BAGEL arXiv 2505.14683; "
    "Qwen-Image arXiv 2508.02324",
)
