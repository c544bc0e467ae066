"""BAGEL's history: a cache of preallocated slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from unigrpo_core.interfaces import History
from unigrpo_models.bagel.config import LanguageConfig
from unigrpo_models.bagel.network import LayerCache

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Look:
    """An image block that was looked at. All of its slots stand at one position."""

    slots: int
    saw: bytes  # kind, image and draw: looks are equal if these are
    content: Tensor = field(compare=False, repr=False)
    """What the block was made of: latents [h, w, token] with their draw in them, or the ViT's
    pixels [3, H, W] in [-1, 1]."""


Item = int | Look
"""What stands in a row: a token's id, or an image block. Either takes one position."""


@dataclass(frozen=True, eq=False)
class BagelHistory(History):
    """The keys and values of B rows. Row b fills the first ``lengths[b]`` slots, in the order of
    its items, and what is beyond is never read. What comes next stands at ``positions[b]``."""

    caches: tuple[LayerCache, ...]  # per layer k, v [B, Hk, capacity, d]
    ids: tuple[tuple[Item, ...], ...]  # the items of every row
    told: tuple[Ids, ...]  # system prompt and prompts of every row, one after the other
    free: tuple[
        int, ...
    ]  # the items before the last prompt, or up to the last image if it is later

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(map(slots, self.ids))

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(len(row) for row in self.ids)

    @cached_property
    def equals(self) -> tuple[int, ...]:
        """For each row the first one that says and shows the same."""
        first = {row: place for place, row in reversed([*enumerate(self.ids)])}
        return tuple(first[row] for row in self.ids)

    @property
    def texts(self) -> tuple[Ids, ...]:
        """The ids of every row, images left out."""
        return tuple(tuple(item for item in row if isinstance(item, int)) for row in self.ids)

    @property
    def unprompted(self) -> tuple[tuple[Item, ...], ...]:
        """Every row up to where it is free of its last prompt."""
        return tuple(row[:end] for row, end in zip(self.ids, self.free, strict=True))

    @property
    def has_images(self) -> bool:
        return self.lengths != self.positions

    def rows(self, index: Tensor) -> Self:
        places = index.tolist()
        index = index.to(self.caches[0][0].device)
        caches = tuple((k[index], v[index]) for k, v in self.caches)
        ids, told = (tuple(part[i] for i in places) for part in (self.ids, self.told))
        return replace(
            self, caches=caches, ids=ids, told=told, free=tuple(self.free[i] for i in places)
        )

    def grown(self, capacity: int) -> Self:
        """A copy with that many slots, which hold every row and more."""
        width = max(self.lengths)

        def copy(old: Tensor) -> Tensor:
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, :width] = old[:, :, :width]
            return new

        return replace(self, caches=tuple((copy(k), copy(v)) for k, v in self.caches))

    def filled(self, ids: tuple[tuple[Item, ...], ...]) -> Self:
        """The same slots as those of other rows, cut where none of them reaches."""
        width = max(map(slots, ids))
        caches = tuple(
            (k[:, :, :width].contiguous(), v[:, :, :width].contiguous()) for k, v in self.caches
        )
        return replace(self, caches=caches, ids=ids)

    def appended(self, new: Sequence[LayerCache], added: Sequence[Sequence[Item]]) -> Self:
        """With items that stand in the first slots of ``new``, per layer k, v [B, Hk, n, d]."""
        before, width = torch.tensor(self.lengths), max(self.lengths)
        count = new[0][0].shape[2]
        place = (before[:, None] + torch.arange(count)).to(new[0][0].device)
        row = torch.arange(len(self), device=place.device)[:, None]

        def both(old: Tensor, new: Tensor) -> Tensor:
            joined = new.new_zeros(*new.shape[:2], width + count, new.shape[3])
            joined[:, :, :width] = old[:, :, :width]
            joined[row, :, place] = new.transpose(1, 2)
            return joined

        caches = tuple(
            (both(k, own_k), both(v, own_v))
            for (k, v), (own_k, own_v) in zip(self.caches, new, strict=True)
        )
        ids = tuple((*a, *b) for a, b in zip(self.ids, added, strict=True))
        return replace(self, caches=caches).filled(ids)


def slots(row: Sequence[Item]) -> int:
    return sum(item.slots if isinstance(item, Look) else 1 for item in row)


def empty_history(config: LanguageConfig, rows: int, device: torch.device) -> BagelHistory:
    """The history of nothing, in the type that autocast computes in."""
    coarse = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if coarse else torch.get_default_dtype()
    shape = (rows, config.num_key_value_heads, 0, config.head_dim)
    nothing = torch.zeros(shape, device=device, dtype=dtype)
    caches = ((nothing, nothing),) * config.num_hidden_layers
    return BagelHistory(caches, ((),) * rows, ((),) * rows, (0,) * rows)
