"""What windows of some steps within a range share."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from unigrpo_core.plugin import Field, Options


class RangeOptions(Options):
    size: int = Field(3, ge=1, description="number of stochastic steps, at least 1")
    range: tuple[int, int] = Field(
        (0, 5), description="steps [lo, hi) they are taken from, 0 <= lo < hi <= steps"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        low, high = self.range
        if not 0 <= low < high:
            raise ValueError(f"range must be [lo, hi) with 0 <= lo < hi; got [{low}, {high})")
        if self.size > high - low:
            raise ValueError(f"size {self.size} does not fit into range [{low}, {high})")
        return self


def count(options: RangeOptions, total: int) -> int:
    """The size.

    Raises:
        ValueError: a rollout of ``total`` steps does not have the range.
    """
    low, high = options.range
    if high > total:
        raise ValueError(
            f"the window's range [{low}, {high}) does not fit: a rollout has {total} steps"
        )
    return options.size
