"""Stochastic steps that need not be neighbours, drawn anew for every rollout.

Paper
    None of its own: the code of UniRL draws UniGRPO's steps (arXiv 2603.23500, Table 3) so;
    DanceGRPO (arXiv 2505.07818) trains a random share of all steps.

Mathematics
    T_SDE: ``size`` different steps of [lo, hi), every such set equally likely.

Convention
    Steps are numbered from 0 (from t = 1). One draw per rollout, the same for all its prompts.

Deviations and readings
    1. UniRL draws from the first fifth of the steps: [0, 5) of 25.
    2. DanceGRPO's steps outside the draw are stochastic too, only not trained; here they follow the
       ODE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from pydantic import model_validator

from unigrpo_core.interfaces import Window
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Field, Options, Provider


class ScatteredOptions(Options):
    size: int = Field(3, ge=1, description="number of stochastic steps, at least 1")
    range: tuple[int, int] = Field(
        (0, 5), description="steps [lo, hi) they are drawn from, 0 <= lo < hi <= steps"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        low, high = self.range
        if not 0 <= low < high:
            raise ValueError(f"range must be [lo, hi) with 0 <= lo < hi; got [{low}, {high})")
        if self.size > high - low:
            raise ValueError(f"size {self.size} is more than range [{low}, {high}) has")
        return self


@dataclass(frozen=True)
class Scattered(Window):
    """``size`` steps anywhere inside ``range``."""

    options: ScatteredOptions

    def steps(self, total: int, key: Key, rollout: int) -> tuple[int, ...]:
        size = self.count(total)
        low, high = self.options.range
        drawn = key.uniform(high - low)
        # Those with the smallest of independent uniform numbers are a uniform choice.
        return tuple(sorted(low + step for step in drawn.argsort()[:size].tolist()))

    def count(self, total: int) -> int:
        low, high = self.options.range
        if high > total:
            raise ValueError(
                f"the window's range [{low}, {high}) does not fit: a rollout has {total} steps"
            )
        return self.options.size


def build(options: ScatteredOptions) -> Scattered:
    return Scattered(options)


PROVIDER = Provider(
    name="scattered",
    options=ScatteredOptions,
    build=build,
    summary="different steps anywhere inside a range, one draw per rollout",
    cite="UniRL's code of UniGRPO arXiv 2603.23500; DanceGRPO arXiv 2505.07818",
)
