"""Classifier-free guidance, optionally on an interval of times.

Paper
    Classifier-free guidance (arXiv 2207.12598); guidance interval (arXiv 2404.07724). The arm
    "with CFG" of UniGRPO's Fig 4 (arXiv 2603.23500).

Mathematics
    v_guided = v_u + scale (v - v_u) where lo < t <= hi, else v; v_u is the velocity without the
    prompt and without the thought (the branch "text").

Convention
    t is the shifted time the model sees. The bounds are compared in t's precision, so a bound and
    a time that are the same float32 number are equal. At scale 1 no point is guided, so no branch
    is computed; at scale 0 the result is v_u.

Deviations and readings
    1. The scale of Fig 4's arm is not given; the default is Flow-GRPO's for BAGEL, 4.
    2. BAGEL's sampler also rescales the guided velocity to the norm of v; that is not done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import field_validator

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

    @field_validator("interval")
    @classmethod
    def _ordered(cls, interval: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError(
                f"interval must be [lo, hi] with 0 <= lo < hi <= 1; got {list(interval)}"
            )
        return interval


@dataclass(frozen=True)
class CFG(Guidance):
    """Extrapolation from the unconditional to the conditional velocity."""

    options: CFGOptions
    branches = ("text",)

    def active(self, t: Tensor) -> Tensor:
        low, high = self.options.interval
        return (t > low) & (t <= high) & (self.options.scale != 1)

    def guides(self, t: float) -> bool:
        low, high, time = (float32(x) for x in (*self.options.interval, t))
        return self.options.scale != 1 and low < time <= high

    def combine(self, v: Tensor, branches: Mapping[str, Tensor], t: Tensor) -> Tensor:
        unconditional = branches["text"]
        guided = unconditional + self.options.scale * (v - unconditional)
        return guided.where(per_point(self.active(t), v), v)


def build(options: CFGOptions) -> CFG:
    return CFG(options)


PROVIDER = Provider(
    name="cfg",
    options=CFGOptions,
    build=build,
    summary="classifier-free guidance: one unconditional call more per guided step",
    cite="CFG arXiv 2207.12598; interval arXiv 2404.07724",
)
