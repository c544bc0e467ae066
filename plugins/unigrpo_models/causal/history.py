"""The history of a causal language model: the ids of its rows.

Keys and values are made where they are used: a write reads each different row once. So a history
holds for whatever weights it is continued with, and what it costs is text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from unigrpo_core.interfaces import History
from unigrpo_models.causal.tokens import Ids


@dataclass(frozen=True)
class CausalHistory(History):
    """What has been said in B rows."""

    ids: tuple[Ids, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: Tensor) -> Self:
        return type(self)(tuple(self.ids[row] for row in index.tolist()))

    def appended(self, texts: Sequence[Ids]) -> Self:
        return type(self)(tuple((*a, *b) for a, b in zip(self.ids, texts, strict=True)))


def sampled(tokens: Tensor, mask: Tensor) -> list[Ids]:
    """The ids of every row of tokens [B, L] where the mask is True."""
    return [
        tuple(token for token, kept in zip(row, each, strict=True) if kept)
        for row, each in zip(tokens.tolist(), mask.tolist(), strict=True)
    ]
