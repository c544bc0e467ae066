"""Keys and values in slots that are there before the tokens are."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class SlotLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache of one layer that takes new tokens in place.

    Args:
        layer: what has been read so far, keys and values [B, Hk, n, d].
        index: int64 [B'], the rows of it that go on, repeats allowed.
        capacity: slots of each.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: Any, index: Tensor, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized, self.device, self.dtype = True, layer.keys.device, layer.keys.dtype
        self._rooms = tuple(_room(x, index, capacity) for x in (layer.keys, layer.values))
        self._show(layer.keys.shape[2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        before, count = self.keys.shape[2], key_states.shape[2]
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, before : before + count] = new
        self._show(before + count)
        return self.keys, self.values

    def _show(self, count: int) -> None:
        self.keys, self.values = (room[:, :, :count] for room in self._rooms)


def _room(x: Tensor, index: Tensor, capacity: int) -> Tensor:
    room = x.new_empty(len(index), x.shape[1], capacity, x.shape[3])
    room[:, :, : x.shape[2]] = x[index]
    return room


def spread(cache: DynamicCache, index: Tensor, capacity: int) -> None:
    """Makes a cache that of the rows at ``index``, in place. Layers that keep more or other than
    all keys and values (a sliding window, a state) stay of their own class."""
    layers: list[Any] = list(cache.layers)
    for place, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.get_seq_length():
            cache.layers[place] = SlotLayer(layer, index, capacity)
        else:
            layer.reorder_cache(index)
