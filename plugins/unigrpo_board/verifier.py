"""Drawing the world and reading it back from pixels.

An image is 24 x 24 RGB in [0, 1]: 3 x 3 cells of 8 pixels, each empty or holding one of 6 x 3
objects, so there are 19 cell templates. Recognition takes for each cell the template with the
smallest root-mean-square error over its 192 numbers, and a cell's quality is
exp(-(rmse / 0.1)^2): 1 for a perfect cell, .91 at an error of .03, .78 at .05, .37 at .1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from unigrpo_board.scene import COLOURS, SHAPES, Kind, Placed, Scene, parse

CELL = 8
SIDE = 3 * CELL
BACKGROUND = (0.12, 0.12, 0.14)
RGB = {
    "red": (0.90, 0.16, 0.18),
    "green": (0.16, 0.74, 0.28),
    "blue": (0.20, 0.36, 0.94),
    "yellow": (0.96, 0.88, 0.20),
    "purple": (0.62, 0.24, 0.80),
    "orange": (0.98, 0.55, 0.10),
}
KINDS: tuple[Kind, ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
EMPTY = len(KINDS)  # the template number of an empty cell
QUALITY_SCALE = 0.1


@cache
def templates() -> np.ndarray:
    """float32 [19, 3, 8, 8]: one cell per kind in the order of KINDS, then the empty one."""
    fine = 16  # samples per pixel side, for smooth edges
    axis = (np.arange(CELL * fine) + 0.5) / fine - CELL / 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    inside = {
        "circle": x**2 + y**2 < 3.2**2,
        "square": np.maximum(abs(x), abs(y)) < 2.8,
        "triangle": (y < 3.0) & (2 * abs(x) < y + 3.4),
    }
    cells = []
    for colour, shape in KINDS:
        cover = inside[shape].reshape(CELL, fine, CELL, fine).mean((1, 3))
        ink, ground = np.array(RGB[colour]), np.array(BACKGROUND)
        cells.append(ground[:, None, None] + (ink - ground)[:, None, None] * cover)
    cells.append(np.broadcast_to(np.array(BACKGROUND)[:, None, None], (3, CELL, CELL)))
    return np.stack(cells).astype(np.float32)


def grid(objects: Iterable[Placed]) -> np.ndarray:
    """int64 [9]: the template number in each cell."""
    numbers = np.full(9, EMPTY)
    for item in objects:
        numbers[item.cell] = KINDS.index(item.kind)
    return numbers


def draw(grids: np.ndarray) -> np.ndarray:
    """float32 images [B, 3, 24, 24] in [0, 1] of template numbers [B, 9]."""
    cells: np.ndarray = templates()[grids]
    cells = cells.reshape(-1, 3, 3, 3, CELL, CELL)  # B, row, column, rgb, y, x
    return cells.transpose(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIDE, SIDE)


@dataclass(frozen=True)
class Reading:
    """What the verifier reads in one image."""

    objects: tuple[Placed, ...]
    qualities: tuple[float, ...]  # of the nine cells

    @property
    def quality(self) -> float:
        return sum(self.qualities) / len(self.qualities)


def read(images: Tensor) -> list[Reading]:
    """Readings of images [B, 3, 24, 24] in [0, 1].

    Raises:
        ValueError: the images have another shape.
    """
    if tuple(images.shape[1:]) != (3, SIDE, SIDE):
        raise ValueError(f"images are {tuple(images.shape)}, expected [B, 3, {SIDE}, {SIDE}]")
    cells = images.detach().float().cpu().reshape(-1, 3, 3, CELL, 3, CELL)
    cells = cells.permute(0, 2, 4, 1, 3, 5).reshape(len(images), 9, 1, -1)
    known = torch.from_numpy(templates()).reshape(1, 1, EMPTY + 1, -1)
    error, number = (cells - known).square().mean(3).min(2)
    quality = torch.exp(-error / QUALITY_SCALE**2)
    return [
        Reading(
            tuple(_placed(n, cell) for cell, n in enumerate(row) if n != EMPTY),
            tuple(qualities),
        )
        for row, qualities in zip(number.tolist(), quality.tolist(), strict=True)
    ]


def _placed(number: int, cell: int) -> Placed:
    colour, shape = KINDS[number]
    return Placed(colour, shape, cell)


def matched(wanted: Counter[Kind], objects: Sequence[Placed], worth: Sequence[float]) -> float:
    """F1 of the drawn objects against the wanted multiset of kinds, each matched object counting
    its worth (the best of a kind first)."""
    total = wanted.total() + len(objects)
    hit = 0.0
    for kind, count in wanted.items():
        found = sorted(
            (w for item, w in zip(objects, worth, strict=True) if item.kind == kind), reverse=True
        )
        hit += sum(found[:count])
    return 2 * hit / total if total else 1.0


def verify(scene: Scene, reading: Reading) -> float:
    """The verifier's score in [0, 1]: F1 of the objects weighted by their cells' quality, times 1
    if the relation holds and else 0.5, times the mean quality of all nine cells."""
    worth = [reading.qualities[item.cell] for item in reading.objects]
    score = matched(scene.wanted(), reading.objects, worth) * reading.quality
    return score if scene.related(reading.objects) else 0.5 * score


def thought_score(scene: Scene, thought: str) -> float:
    """The same score for what the thought lists, as if drawn perfectly; 0 if it is malformed."""
    objects = parse(thought)
    if objects is None:
        return 0.0
    score = matched(scene.wanted(), objects, [1.0] * len(objects))
    return score if scene.related(objects) else 0.5 * score


def faithfulness(thought: str, reading: Reading) -> float:
    """F1 in [0, 1] of what is drawn against what the thought lists, where an object counts only
    with its colour, shape and cell; a malformed thought lists nothing that can be followed: 0."""
    objects = parse(thought)
    if objects is None:
        return 0.0
    return 2 * len(set(objects) & set(reading.objects)) / (len(objects) + len(reading.objects))
