"""The embedded world in words: scenes, prompts that need reasoning, and thoughts.

A scene asks for one to three objects of one kind and perhaps one object of another kind that they
stand in a relation to. A prompt says it directly ("two green circle") or so that it must be worked
out ("half of four mix yellow and blue neither square nor triangle"). A thought lists every object
as colour, shape and place ("green circle top green circle center") on a board of 3 x 3 cells.
Words are separated by single blanks; there is no plural and no punctuation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle")
PLACES = (
    *("topleft", "top", "topright"),
    *("left", "center", "right"),
    *("bottomleft", "bottom", "bottomright"),
)
NUMBERS = ("one", "two", "three", "four", "five", "six")
SAID = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
MIXES = {"green": ("yellow", "blue"), "purple": ("red", "blue"), "orange": ("red", "yellow")}
WORDS = (
    *COLOURS,
    *SHAPES,
    *PLACES,
    *NUMBERS,
    *("above", "below", "plus", "minus", "half", "of", "mix", "and"),
    *("neither", "nor", "opposite", "a"),
)
HELD_OUT_SHARE = 8  # one composition in so many is held out

Kind = tuple[str, str]  # colour, shape


@dataclass(frozen=True)
class Placed:
    """An object on the board; ``cell`` is 0 .. 8, row by row."""

    colour: str
    shape: str
    cell: int

    @property
    def kind(self) -> Kind:
        return (self.colour, self.shape)


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: ``count`` objects of ``kind``, and if ``other`` is given they all
    stand in ``relation`` ("left": in a column further left, and so on) to one such object."""

    count: int
    kind: Kind
    relation: str | None = None
    other: Kind | None = None

    @property
    def trained(self) -> bool:
        """Whether training prompts may ask for this composition, whatever their wording."""
        digest = blake2b(repr((self.count, self.kind, self.relation, self.other)).encode())
        return digest.digest()[0] % HELD_OUT_SHARE != 0

    @property
    def held_out(self) -> bool:
        """Whether no training prompt asks for this composition, nor for its mirror image: one A
        left of a B is one B right of an A. What has a trained mirror image is on neither side."""
        if self.trained:
            return False
        if self.count != 1 or self.relation is None or self.other is None:
            return True
        return not Scene(1, self.other, OPPOSITE[self.relation], self.kind).trained

    def wanted(self) -> Counter[Kind]:
        kinds = Counter({self.kind: self.count})
        if self.other is not None:
            kinds[self.other] += 1
        return kinds

    def related(self, objects: Sequence[Placed]) -> bool:
        """Whether the relation holds among the objects (True if none is asked for)."""
        if self.relation is None:
            return True
        subjects = [item.cell for item in objects if item.kind == self.kind]
        others = [item.cell for item in objects if item.kind == self.other]
        return bool(subjects and others) and all(
            _stands(a, self.relation, b) for a in subjects for b in others
        )

    def metadata(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "kind": list(self.kind),
            "relation": self.relation,
            "other": None if self.other is None else list(self.other),
        }

    @classmethod
    def from_metadata(cls, data: Any) -> Scene:
        other = data["other"]
        return cls(data["count"], tuple(data["kind"]), data["relation"], other and tuple(other))


def _stands(cell: int, relation: str, other: int) -> bool:
    row, column, other_row, other_column = cell // 3, cell % 3, other // 3, other % 3
    return {
        "left": column < other_column,
        "right": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }[relation]


def draw_scene(rng: np.random.Generator, wanted: Callable[[Scene], bool]) -> Scene:
    """A random scene among those wanted, such as ``lambda scene: scene.trained``."""
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    while True:
        count = int(rng.integers(1, 4))
        first, second = (kinds[i] for i in rng.choice(len(kinds), 2, replace=False))
        if rng.random() < 0.6:
            scene = Scene(count, first, str(rng.choice(list(SAID))), second)
        else:
            scene = Scene(count, first)
        if wanted(scene):
            return scene


def say(scene: Scene, rng: np.random.Generator) -> str:
    """A prompt for the scene; each part is direct or a riddle with equal chance."""
    words = [_say_count(scene.count, rng), _say_colour(scene.kind[0], rng)]
    words.append(_say_shape(scene.kind[1], rng))
    if scene.relation is not None and scene.other is not None:
        if rng.random() < 0.5:
            words.append(SAID[scene.relation])
        else:
            words.append(f"opposite of {SAID[OPPOSITE[scene.relation]]}")
        words.append(f"a {scene.other[0]} {scene.other[1]}")
    return " ".join(words)


def _say_count(count: int, rng: np.random.Generator) -> str:
    form = rng.integers(6)
    if form < 3:
        return NUMBERS[count - 1]
    if form == 3:
        return f"half of {NUMBERS[2 * count - 1]}"
    if form == 4 and count > 1:
        first = int(rng.integers(1, count))
        return f"{NUMBERS[first - 1]} plus {NUMBERS[count - first - 1]}"
    taken = int(rng.integers(1, 7 - count))
    return f"{NUMBERS[count + taken - 1]} minus {NUMBERS[taken - 1]}"


def _say_colour(colour: str, rng: np.random.Generator) -> str:
    if colour in MIXES and rng.random() < 0.5:
        first, second = rng.permutation(MIXES[colour])
        return f"mix {first} and {second}"
    return colour


def _say_shape(shape: str, rng: np.random.Generator) -> str:
    if rng.random() < 0.5:
        first, second = rng.permutation([other for other in SHAPES if other != shape])
        return f"neither {first} nor {second}"
    return shape


def lay_out(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """Random cells for the scene's objects, such that its relation holds: the one other object
    first (where it stands decides where there is room), then those of the main kind row by row."""
    while True:
        cells = rng.permutation(9)[: scene.count + (scene.other is not None)].tolist()
        objects = [Placed(*scene.kind, cell) for cell in sorted(cells[: scene.count])]
        if scene.other is not None:
            objects.insert(0, Placed(*scene.other, cells[-1]))
        if scene.related(objects):
            return objects


def think(objects: Sequence[Placed]) -> str:
    """The thought that lists the objects."""
    return " ".join(f"{item.colour} {item.shape} {PLACES[item.cell]}" for item in objects)


def parse(thought: str) -> list[Placed] | None:
    """The objects a thought lists; None if it is no list of colour, shape and place or names a
    cell twice."""
    words = thought.split()
    if not words or len(words) % 3:
        return None
    objects = []
    for colour, shape, place in zip(words[::3], words[1::3], words[2::3], strict=True):
        if colour not in COLOURS or shape not in SHAPES or place not in PLACES:
            return None
        objects.append(Placed(colour, shape, PLACES.index(place)))
    cells = {item.cell for item in objects}
    return objects if len(cells) == len(objects) else None
