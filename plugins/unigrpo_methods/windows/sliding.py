"""A window of stochastic steps that moves from the noise towards the data as training goes on.

Paper
    MixGRPO (arXiv 2507.21802), its progressive schedule.

Mathematics
    T_SDE = {l, ..., l + size - 1}; every ``every`` rollouts l moves by ``stride``, until the window
    touches the end: l = min(begin + stride floor((rollout - 1) / every), end - size).

Convention
    Steps are numbered from 0 (from t = 1), rollouts from 1. Nothing is drawn. The window stays at
    the end. With size = the number of steps it is every step, and MixGRPO is Flow-GRPO.

Deviations and readings
    1. The paper's 25 iterations between moves are rollouts here; an iteration of its code is one.
    2. Its code may start over at the end (roll back); that is not done.
    3. Its Flash variant, a higher-order solver after the window, is not part of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from pydantic import model_validator

from unigrpo_core.interfaces import Window
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Field, Options, Provider


class SlidingOptions(Options):
    size: int = Field(4, ge=1, description="number of stochastic steps, at least 1")
    begin: int = Field(0, ge=0, description="the first step of the window at the start, from 0 on")
    end: int | None = Field(
        None, ge=1, description="the step before which the window stays; absent: the last is in"
    )
    stride: int = Field(1, ge=1, description="steps that the window moves by, at least 1")
    every: int = Field(25, ge=1, description="rollouts between two moves, at least 1")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.end is not None and self.begin + self.size > self.end:
            raise ValueError(
                f"size {self.size} does not fit between begin {self.begin} and end {self.end}"
            )
        return self


@dataclass(frozen=True)
class Sliding(Window):
    """``size`` steps in a row, later ones in later rollouts."""

    options: SlidingOptions

    def steps(self, total: int, key: Key, rollout: int) -> tuple[int, ...]:
        size, end = self.count(total), self.options.end or total
        moves = (rollout - 1) // self.options.every
        begin = min(self.options.begin + self.options.stride * moves, end - size)
        return tuple(range(begin, begin + size))

    def count(self, total: int) -> int:
        options = self.options
        end = options.end or total
        if end > total:
            raise ValueError(
                f"the window's end {end} does not exist: a rollout has {total} steps, numbered 0 "
                f"to {total - 1}"
            )
        if options.begin + options.size > end:
            raise ValueError(
                f"the window's {options.size} steps from step {options.begin} on do not fit: a "
                f"rollout has {total} steps"
            )
        return options.size


def build(options: SlidingOptions) -> Sliding:
    return Sliding(options)


PROVIDER = Provider(
    name="sliding",
    options=SlidingOptions,
    build=build,
    summary="a contiguous window that moves towards the data every few rollouts",
    cite="MixGRPO arXiv 2507.21802",
)
