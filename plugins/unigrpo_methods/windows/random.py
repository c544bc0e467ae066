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

from unigrpo_core.interfaces import Window
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Provider
from unigrpo_methods.windows import ranges


class RandomOptions(ranges.RangeOptions):
    """How many steps, and of which."""


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
        return ranges.count(self.options, total)


def build(options: RandomOptions) -> Random:
    return Random(options)


PROVIDER = Provider(
    name="random",
    options=RandomOptions,
    build=build,
    summary="a contiguous window, begin uniform inside a range, one draw per rollout",
    cite="UniGRPO arXiv 2603.23500 Eq 6, Table 3",
)
