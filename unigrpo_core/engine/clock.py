"""What a step takes: wall time per phase, and calls of the network."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Clock:
    """Wall seconds per named phase (a GPU is waited for at both ends), and the velocities computed,
    each of one image at one time in one context."""

    device: torch.device
    phases: dict[str, float] = field(default_factory=dict)
    calls: int = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._settle()
        start = time.perf_counter()
        yield
        self._settle()
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
