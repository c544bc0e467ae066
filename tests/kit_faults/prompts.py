"""Prompt sources with one fault each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kit_faults import Counted, Faults, drawing
from unigrpo_core import testing
from unigrpo_core.interfaces import PromptSource
from unigrpo_core.records import Prompt


class GoodSource(PromptSource):
    def train(self, seed, start, count):
        numbers = range(start, start + count)
        return tuple(Prompt(f"t{i}", f"draw {i * 7919 + seed} lines", {"n": i}) for i in numbers)

    def held_out(self, count):
        return tuple(Prompt(f"h{i}", f"draw {i} dots") for i in range(min(count, 40)))


def training(change: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, seed, start, count: change(
        GoodSource.train(self, seed, start, count), start, seed
    )


def holding(change: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, count: change(GoodSource.held_out(self, count), count)


def from_where_it_was(self, seed, start, count):
    self.place = getattr(self, "place", 0) + count
    return GoodSource.train(self, seed, self.place - count, count)


class Numbered(GoodSource):
    """Every one that is built holds out other prompts."""

    built = Counted()

    def __init__(self):
        self.number = self.built()

    def held_out(self, count):
        return super().held_out(count + self.number)[self.number :]


class NumberedTraining(Numbered):
    """Every one that is built trains on other prompts."""

    held_out = GoodSource.held_out

    def train(self, seed, start, count):
        return super().train(seed + self.number, start, count)


source = Faults(testing.PromptSourceConformance, GoodSource)
source(
    "test_prompts_are_texts_with_an_id",
    "63 prompts, asked for 64",
    train=training(lambda found, start, seed: found[:-1]),
)
source(
    "test_prompts_are_texts_with_an_id",
    "the text is empty",
    train=training(lambda found, start, seed: tuple(Prompt(p.id, " ") for p in found)),
)
source(
    "test_prompts_are_texts_with_an_id",
    "expected a tuple",
    held_out=holding(lambda found, count: list(found)),
)
source(
    "test_prompts_are_texts_with_an_id",
    "the metadata are not JSON",
    held_out=holding(lambda found, count: tuple(Prompt(p.id, p.text, {1: 2}) for p in found)),
)
source("test_training_resumes_anywhere", "", train=from_where_it_was)
source("test_training_is_the_same_in_every_run", "", build=Numbered)
source(
    "test_the_seed_decides",
    "seeds 0 and 1",
    train=lambda self, seed, start, count: GoodSource.train(self, 0, start, count),
)
source(
    "test_the_stream_is_endless",
    "",
    train=training(lambda found, start, seed: found if start < 5000 else ()),
)
source(
    "test_ids_are_unique",
    r"\['t0', 't1', 't10'\]",
    train=training(
        lambda found, start, seed: tuple(
            Prompt(f"t{(start + i) % 500}", p.text) for i, p in enumerate(found)
        )
    ),
)
source(
    "test_ids_are_unique",
    "'h'",
    held_out=holding(lambda found, count: tuple(Prompt("h", p.text) for p in found)),
)
source(
    "test_held_out_prompts_begin_alike",
    "nothing could be evaluated",
    held_out=holding(lambda found, count: ()),
)
source(
    "test_held_out_prompts_begin_alike",
    r"held_out\(1\)",
    held_out=holding(lambda found, count: found[::-1]),
)
source(
    "test_held_out_texts_are_never_trained",
    "seed 2",
    train=training(
        lambda found, start, seed: (
            tuple(Prompt(p.id, "draw 3 dots") for p in found) if seed == 2 else found
        )
    ),
)
source("test_nothing_global_is_drawn", "of random;", train=drawing(GoodSource.train))
source("test_nothing_global_is_drawn", "of random;", held_out=drawing(GoodSource.held_out))
source(
    "test_prompts_are_texts_with_an_id",
    "asked for 0",
    train=training(lambda found, start, seed: found or (Prompt("t", "a line"),)),
)
for says, prompt in {
    "is no Prompt": ("t0", "a line"),
    "the id is no text": Prompt(0, "a line"),
    "the id is empty": Prompt("", "a line"),
    "the text is none": Prompt("t0", 0),
}.items():
    source(
        "test_prompts_are_texts_with_an_id",
        says,
        train=training(lambda found, start, seed, prompt=prompt: (prompt, *found)[: len(found)]),
    )
source("test_training_is_the_same_in_every_run", "", build=NumberedTraining)
source(
    "test_training_resumes_anywhere",
    "",
    train=lambda self, seed, start, count: GoodSource.train(self, seed + count, start, count),
)
source(
    "test_training_resumes_anywhere",
    "",
    train=lambda self, seed, start, count: GoodSource.train(
        self, seed, start if count > 1 else start + 1, count
    ),
)
