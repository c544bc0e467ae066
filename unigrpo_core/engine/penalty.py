"""Regularizers as the engine calls them: what comes back is checked, and who failed is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from unigrpo_core.engine.faults import blamed, floats
from unigrpo_core.records import FlowStep, TokenStep

Step = TypeVar("Step", FlowStep, TokenStep)


def checked(who: str, penalty: Callable[[Step], Tensor]) -> Callable[[Step], Tensor]:
    """The penalty, which raises a PluginError that begins with ``who`` if it fails or returns what
    is no float tensor [B, K] or [B, L]."""

    def call(step: Step) -> Tensor:
        with blamed(who):
            values = penalty(step)
        return floats(who, values, (step.t if isinstance(step, FlowStep) else step.logps).shape)

    return call
