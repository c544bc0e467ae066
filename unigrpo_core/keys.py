"""Keyed randomness: every draw of a run is a pure function of its key.

A key is a path such as ``(seed, "train", step, prompt id, 3, "noise")``. Its draws come from
NumPy's counter-based Philox generator on the CPU, keyed by a hash of that path. So they do not
depend on the batch size, the number of processes, the device or the point of resumption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, device


@dataclass(frozen=True)
class Key:
    """A place in the tree of draws. ``child`` names a place below it; two paths never collide."""

    path: tuple[int | str, ...]

    def child(self, *parts: int | str) -> Key:
        return Key(self.path + parts)

    def generator(self) -> np.random.Generator:
        """A fresh generator at the start of this key's stream."""
        import numpy as np

        # repr of a tuple of int and str is injective, so distinct paths hash distinct bytes.
        digest = blake2b(repr(self.path).encode(), digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))

    def normal(self, shape: Sequence[int]) -> np.ndarray:
        """Standard normal draws, float32, of the given shape."""
        import numpy as np

        return self.generator().standard_normal(tuple(shape), dtype=np.float32)

    def uniform(self, count: int) -> np.ndarray:
        """``count`` draws uniform in [0, 1), float64; a shorter one is a prefix of a longer one."""
        return self.generator().random(count)

    def integer(self, bound: int) -> int:
        """One integer, uniform on 0 .. bound - 1."""
        return int(self.generator().integers(bound))


def normals(keys: Sequence[Key], shape: Sequence[int], device: device | str) -> Tensor:
    """Standard normal draws, one row per key: float32 [len(keys), *shape] on ``device``."""
    import numpy as np
    import torch

    rows = np.empty((len(keys), *shape), dtype=np.float32)
    for row, key in enumerate(keys):
        rows[row] = key.normal(shape)
    return torch.from_numpy(rows).to(device)


def uniforms(keys: Sequence[Key], count: int, device: device | str) -> Tensor:
    """Uniform draws in [0, 1), one row per key: float64 [len(keys), count] on ``device``."""
    import numpy as np
    import torch

    rows = np.stack([key.uniform(count) for key in keys]) if keys else np.empty((0, count))
    return torch.from_numpy(rows).to(device)
