"""Regularizers as the engine calls them: what comes back is checked, and who failed is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from unigrpo_core.engine.faults import passes
from unigrpo_core.errors import PluginError
from unigrpo_core.loading import said
from unigrpo_core.records import FlowStep, TokenStep

Step = TypeVar("Step", FlowStep, TokenStep)


def checked(who: str, penalty: Callable[[Step], Tensor]) -> Callable[[Step], Tensor]:
    """The penalty, which raises a PluginError that begins with ``who`` if it fails or returns what
    is no float tensor [B, K] or [B, L]: another shape would be broadcast to a meaningless loss."""

    def call(step: Step) -> Tensor:
        try:
            values = penalty(step)
        except BaseException as error:
            if passes(error):
                raise
            raise PluginError(f"{who} failed: {said(error)}") from error
        want = step.t.shape if isinstance(step, FlowStep) else step.logps.shape
        if not (isinstance(values, Tensor) and values.is_floating_point() and values.shape == want):
            got = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else values
            raise PluginError(f"{who} returned {got}, expected floats {tuple(want)}")
        return values

    return call
