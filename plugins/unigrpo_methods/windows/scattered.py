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

from unigrpo_core.interfaces import Window
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Provider
from unigrpo_methods.windows import ranges


class ScatteredOptions(ranges.RangeOptions):
    """How many steps, and of which."""


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
        return ranges.count(self.options, total)


def build(options: ScatteredOptions) -> Scattered:
    return Scattered(options)


PROVIDER = Provider(
    name="scattered",
    options=ScatteredOptions,
    build=build,
    summary="different steps anywhere inside a range, one draw per rollout",
    cite="UniRL's code of UniGRPO arXiv 2603.23500; DanceGRPO arXiv 2505.07818",
)
