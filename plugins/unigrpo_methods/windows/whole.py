"""Every step is stochastic, and trained.

Paper
    Flow-GRPO (arXiv 2505.05470): all steps of a short trajectory.

Mathematics
    T_SDE = {0, ..., T - 1}, or without the last, {0, ..., T - 2}.

Convention
    Step 0 is the first, from t = 1. Under ``flow_sde`` the last step has noise, of std a t / sqrt(1
    - t), which stays on the final latents; under ``cps`` it has none, and last = false is needed.

Deviations and readings
    1. Flow-GRPO's code trains a share of .99 of the steps, so all but the last, which is stochastic
       there all the same. Here a step that is not trained follows the ODE.
"""

from __future__ import annotations

from dataclasses import dataclass

from unigrpo_core.interfaces import Window
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Field, Options, Provider


class WholeOptions(Options):
    last: bool = Field(True, description="whether the last step, to t = 0, is among them")


@dataclass(frozen=True)
class Whole(Window):
    """All steps."""

    options: WholeOptions

    def steps(self, total: int, key: Key, rollout: int) -> tuple[int, ...]:
        return tuple(range(self.count(total)))

    def count(self, total: int) -> int:
        count = total if self.options.last else total - 1
        if count < 1:
            raise ValueError(
                f"the window has no step to train: last = {str(self.options.last).lower()}, and a "
                f"rollout has {total} steps"
            )
        return count


def build(options: WholeOptions) -> Whole:
    return Whole(options)


PROVIDER = Provider(
    name="all",
    options=WholeOptions,
    build=build,
    summary="every step is stochastic; the last one optional",
    cite="Flow-GRPO arXiv 2505.05470",
)
