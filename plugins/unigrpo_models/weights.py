"""Kept copies of trainable weights, such as a frozen reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightSets:
    """Copies of parameters by name. Swapping exchanges storage, so nothing is rounded, and the
    module computes with the kept weights wherever it is wrapped. With ``host``, whatever is not
    computed with waits in the host's memory, and is copied over at every swap."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, host: bool = False) -> None:
        self._parameters = dict(parameters)
        self._host = host
        self._kept: dict[str, dict[str, Tensor]] = {}

    def keep(self, name: str, decay: float | None = None) -> None:
        if decay is not None and name in self._kept:
            for key, parameter in self._parameters.items():
                kept = self._kept[name][key]
                kept.lerp_(parameter.detach().to(kept.device), 1 - decay)
            return
        self._kept[name] = {
            key: self._put_by(p.detach().clone()) for key, p in self._parameters.items()
        }

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Computes with the weights kept under ``name``, without gradient."""
        if name not in self._kept:
            raise KeyError(f"no weights were kept as {name!r}; there are {sorted(self._kept)}")
        self._swap(name)
        try:
            with torch.no_grad():
                yield
        finally:
            self._swap(name)

    def _swap(self, name: str) -> None:
        kept = self._kept[name]
        for key, parameter in self._parameters.items():
            now = parameter.data
            parameter.data = kept[key].to(now.device, copy=False)
            kept[key] = self._put_by(now)

    def _put_by(self, weight: Tensor) -> Tensor:
        return weight.cpu() if self._host else weight
