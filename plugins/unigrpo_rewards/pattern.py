"""Pattern: a rule on what was written, as a share of its characters or words.

Mathematics
    score = (number of parts that match in whole) / max(1, number of parts), the parts being the
    thought's characters, or its words (what stands between blanks). Matching is that of Python's
    ``re`` module; an empty thought has score 0.

Convention
    A word of more than 64 characters does not match, whatever the pattern. A matcher that goes
    back and tries again can take exponential time, so a pattern is refused, before any run, if it
    has more than 100,000 ways to go through 64 characters (repetitions inside repetitions,
    alternatives inside repetitions); each different part is matched once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from re import _parser  # type: ignore[attr-defined]
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from unigrpo_core.plugin import Field, Options, Provider
from unigrpo_core.records import RewardBatch

if TYPE_CHECKING:
    from torch import Tensor

    from unigrpo_core.interfaces import ScoreFunction

LONGEST = 64  # characters of a word that is matched
WAYS = 100_000


class PatternOptions(Options):
    pattern: str = Field(
        min_length=1,
        description=r"regular expression of Python that a part has to match in whole, such as \d",
    )
    per: Literal["character", "word"] = Field(
        "character", description="the parts that are counted: characters, or words between blanks"
    )

    @field_validator("pattern")
    @classmethod
    def _bounded(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
            ways = _ways(_parser.parse(pattern))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"no regular expression: {error}") from error
        if ways > WAYS:
            raise ValueError(
                "a regular expression that may try without end: repetitions or alternatives stand "
                f"inside of repetitions, or too many in a row (at most {WAYS:,} ways through "
                f"{LONGEST} characters); write a plainer one, such as [a-z]+ for ([a-z]+)*"
            )
        return pattern


def _ways(items: Any) -> int:
    """A bound on the ways in which a matcher may go through a text of ``LONGEST`` characters."""
    total = 1
    for operation, value in items:
        total *= _ways_of(str(operation), value)
        if total > WAYS:
            return WAYS + 1
    return total


def _ways_of(operation: str, value: Any) -> int:
    if operation in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        low, high, body = value
        inner, high = _ways(body), min(int(high), LONGEST)
        return sum(min(inner, 2**20) ** min(n, 64) for n in range(min(low, high), high + 1)) or 1
    if operation == "BRANCH":
        return sum(_ways(body) for body in value[1])
    if operation == "GROUPREF_EXISTS":
        return sum(_ways(body) for body in value[1:] if body is not None)
    if operation == "SUBPATTERN":
        return _ways(value[-1])
    if operation in ("ASSERT", "ASSERT_NOT"):
        return _ways(value[1])
    return _ways(value) if operation == "ATOMIC_GROUP" else 1


def share(parts: Sequence[str], matches: Callable[[str], bool]) -> float:
    return sum(map(matches, parts)) / max(1, len(parts))


def build(options: PatternOptions) -> ScoreFunction:
    found = re.compile(options.pattern)

    def score(batch: RewardBatch) -> Tensor:
        """float32 [B].

        Raises:
            ValueError: the episodes have no thought.
        """
        import torch

        if batch.thoughts is None:
            raise ValueError("the reward 'pattern' reads a thought, and the episode writes none")

        @cache
        def matches(part: str) -> bool:
            return len(part) <= LONGEST and found.fullmatch(part) is not None

        texts = [t.split() if options.per == "word" else tuple(t) for t in batch.thoughts]
        return torch.tensor([share(parts, matches) for parts in texts], dtype=torch.float32)

    return score


PROVIDER = Provider(
    name="pattern",
    options=PatternOptions,
    build=build,
    reads=("thought",),
    range=(0.0, 1.0),
    summary="share of a thought's characters or words that match a regular expression",
)
