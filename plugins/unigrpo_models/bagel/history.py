"""BAGEL's history: a text cache of preallocated slots."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from unigrpo_core.interfaces import History
from unigrpo_models.bagel.config import LanguageConfig
from unigrpo_models.bagel.network import LayerCache


@dataclass(frozen=True, eq=False)
class BagelHistory(History):
    """The keys and values of B texts. Slot = position; row b fills the first ``lengths[b]`` slots
    and what is beyond is never read. The next image block stands at position ``lengths[b]``."""

    caches: tuple[LayerCache, ...]  # per layer k, v [B, Hk, capacity, d]
    ids: tuple[tuple[int, ...], ...]  # the text of every row

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(row) for row in self.ids)

    @cached_property
    def equals(self) -> tuple[int, ...]:
        """For each row the first one with the same text."""
        first = {text: row for row, text in reversed([*enumerate(self.ids)])}
        return tuple(first[text] for text in self.ids)

    def rows(self, index: Tensor) -> Self:
        places = index.tolist()
        index = index.to(self.caches[0][0].device)
        caches = tuple((k[index], v[index]) for k, v in self.caches)
        return type(self)(caches, tuple(self.ids[i] for i in places))

    def grown(self, capacity: int) -> Self:
        """A copy with that many slots, which hold every row and more."""
        width = max(self.lengths)

        def copy(old: Tensor) -> Tensor:
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, :width] = old[:, :, :width]
            return new

        return type(self)(tuple((copy(k), copy(v)) for k, v in self.caches), self.ids)

    def filled(self, ids: tuple[tuple[int, ...], ...]) -> Self:
        """The same slots as those of longer texts, cut where no row reaches."""
        width = max(len(row) for row in ids)
        caches = tuple(
            (k[:, :, :width].contiguous(), v[:, :, :width].contiguous()) for k, v in self.caches
        )
        return type(self)(caches, ids)


def empty_history(config: LanguageConfig, rows: int, device: torch.device) -> BagelHistory:
    """The history of nothing."""
    nothing = torch.zeros(rows, config.num_key_value_heads, 0, config.head_dim, device=device)
    return BagelHistory(((nothing, nothing),) * config.num_hidden_layers, ((),) * rows)
