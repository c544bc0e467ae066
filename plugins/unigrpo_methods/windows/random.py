"""A contiguous window of stochastic steps, placed anew for every rollout.

Paper
    UniGRPO (arXiv 2603.23500), Eq 6 and Table 3 ("SDE window [0, 5]", "SDE window size 3");
    Flow-GRPO-Fast.

Mathematics
    begin ~ U{lo, ..., hi - size}, T_SDE = {begin, ..., begin + size - 1}, for range = [lo, hi).

Convention
    Steps are numbered from 0 (from t = 1). One draw per rollout, the same for all its prompts. The
    paper's size 3 in [0, 5) begins at 0, 1 or 2.

Deviations and readings
    1. The paper does not say whether [0, 5] includes step 5; read as Flow-GRPO's code for BAGEL
       does, half open. (Others draw scattered steps instead.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from pydantic import model_validator

from unigrpo_core.interfaces import Window
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Field, Options, Provider


class RandomOptions(Options):
    size: int = Field(3, ge=1, description="number of stochastic steps, at least 1")
    range: tuple[int, int] = Field(
        (0, 5), description="steps [lo, hi) the window stays inside, 0 <= lo < hi <= steps"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        low, high = self.range
        if not 0 <= low < high:
            raise ValueError(f"range must be [lo, hi) with 0 <= lo < hi; got [{low}, {high})")
        if self.size > high - low:
            raise ValueError(f"size {self.size} does not fit into range [{low}, {high})")
        return self


@dataclass(frozen=True)
class Random(Window):
    """``size`` steps in a row, somewhere inside ``range``."""

    options: RandomOptions

    def steps(self, total: int, key: Key, rollout: int) -> tuple[int, ...]:
        size = self.count(total)
        low, high = self.options.range
        begin = low + key.integer(high - low - size + 1)
        return tuple(range(begin, begin + size))

    def count(self, total: int) -> int:
        low, high = self.options.range
        if high > total:
            raise ValueError(
                f"the window's range [{low}, {high}) does not fit: a rollout has {total} steps"
            )
        return self.options.size


def build(options: RandomOptions) -> Random:
    return Random(options)


PROVIDER = Provider(
    name="random",
    options=RandomOptions,
    build=build,
    summary="a contiguous window, begin uniform inside a range, one draw per rollout",
    cite="UniGRPO arXiv 2603.23500 Eq 6, Table 3",
)
