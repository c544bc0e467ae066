"""The same stochastic steps in every rollout.

Paper
    UniGRPO (arXiv 2603.23500), Eq 6: the set T_SDE; here a constant one.

Mathematics
    T_SDE = the given step numbers.

Convention
    Step 0 is the first, from t = 1. All other steps follow the ODE, without gradient.

Deviations and readings
    1. The paper draws its window anew (see ``random``); this is the control without that draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from pydantic import field_validator

from unigrpo_core.interfaces import Window
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Field, Options, Provider


class FixedOptions(Options):
    steps: tuple[int, ...] = Field(
        min_length=1, description="numbers of the stochastic steps, rising, from 0 to steps - 1"
    )

    @field_validator("steps")
    @classmethod
    def _rising(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if steps[0] < 0 or any(one >= two for one, two in pairwise(steps)):
            raise ValueError(f"steps must be rising numbers from 0 on; got {list(steps)}")
        return steps


@dataclass(frozen=True)
class Fixed(Window):
    """The steps of the options, whatever the key."""

    options: FixedOptions

    def steps(self, total: int, key: Key, rollout: int) -> tuple[int, ...]:
        self.count(total)
        return self.options.steps

    def count(self, total: int) -> int:
        steps = self.options.steps
        if steps[-1] >= total:
            raise ValueError(
                f"the window's step {steps[-1]} does not exist: a rollout has {total} steps, "
                f"numbered 0 to {total - 1}"
            )
        return len(steps)


def build(options: FixedOptions) -> Fixed:
    return Fixed(options)


PROVIDER = Provider(
    name="fixed",
    options=FixedOptions,
    build=build,
    summary="the same stochastic steps in every rollout",
    cite="UniGRPO arXiv 2603.23500 Eq 6",
)
