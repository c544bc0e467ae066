"""The embedded world: its split, its prompts, its judge, and the data its model learned from."""

from collections import Counter
from dataclasses import replace
from hashlib import sha256
from importlib.util import find_spec
from itertools import product
from json import loads
from pathlib import Path

import numpy as np
import pytest
import torch
from unigrpo_board.make_checkpoint import example, misread, spoil
from unigrpo_board.prompts import PROVIDER as PROMPTS
from unigrpo_board.rewards import PROVIDER as REWARD
from unigrpo_board.scene import (
    COLOURS,
    PLACES,
    SHAPES,
    WORDS,
    Placed,
    Scene,
    draw_scene,
    lay_out,
    parse,
    say,
    think,
)
from unigrpo_board.verifier import draw, grid, read

from unigrpo_core.errors import UserError
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Options
from unigrpo_core.records import Prompt, RewardBatch


def trained(scene):
    return scene.trained


def anything(scene):
    return True


SCENE = Scene(2, ("red", "circle"), "left", ("blue", "square"))
DRAWN = [Placed("blue", "square", 5), Placed("red", "circle", 0), Placed("red", "circle", 4)]


@pytest.fixture
def source():
    return PROMPTS.build(Options())


def rng(*name):
    return Key(("world", *name)).generator()


def composition(prompt):
    return Scene.from_metadata(prompt.metadata)


# --- the split --------------------------------------------------------------------------------


def test_held_out_compositions_are_never_trained_on(source):
    train = {composition(p) for seed in (0, 1) for p in source.train(seed, 0, 3000)}
    held_out = {composition(p) for p in source.held_out(1000)}
    assert len(train) > 1000
    assert len(held_out) > 150
    assert not train & held_out


def test_the_split_goes_by_composition_whatever_the_wording(source):
    texts = {p.text for p in source.train(0, 0, 3000)}
    assert not texts & {p.text for p in source.held_out(1000)}
    kinds = list(product(COLOURS, SHAPES))
    scenes = [Scene(n, kind) for n in (1, 2, 3) for kind in kinds]
    scenes += [
        Scene(n, a, relation, b)
        for n in (1, 2, 3)
        for a, b in product(kinds, kinds)
        if a != b
        for relation in ("left", "right", "above", "below")
    ]
    share = sum(not scene.trained for scene in scenes) / len(scenes)
    assert 0.1 < share < 0.15
    assert not any(scene.trained and scene.held_out for scene in scenes)


def test_no_mirror_image_of_a_held_out_composition_is_trained(source):
    """One A left of a B is one B right of an A, though the two are said differently."""
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    train = {composition(p) for seed in (0, 1) for p in source.train(seed, 0, 3000)}
    mirrored = 0
    for scene in {composition(p) for p in source.held_out(1000)}:
        if scene.count == 1 and scene.relation:
            mirrored += 1
            assert Scene(1, scene.other, opposite[scene.relation], scene.kind) not in train
    assert mirrored > 10


def test_the_base_learned_from_training_compositions_only():
    """Before anything is spoiled, every example's prompt is a training composition's."""
    generator = rng("examples")
    for _ in range(300):
        state = generator.bit_generator.state
        row = example(generator, wrong_thoughts=0.5, wrong_images=0.5)
        again = np.random.Generator(np.random.Philox())
        again.bit_generator.state = state
        scene = draw_scene(again, trained)
        assert scene.trained
        assert set(row.prompt.split()) <= set(WORDS)
        clean = example_of(state, wrong_thoughts=0.0)
        assert wanted(clean.thought) == scene.wanted()


def example_of(state, wrong_thoughts):
    generator = np.random.Generator(np.random.Philox())
    generator.bit_generator.state = state
    return example(generator, wrong_thoughts=wrong_thoughts, wrong_images=0.0)


def wanted(thought):
    return Counter(item.kind for item in parse(thought))


def test_corruption_is_at_the_stated_rate_and_touches_one_thing():
    generator = rng("corruption")
    wrong = 0
    for _ in range(400):
        state = generator.bit_generator.state
        row = example(generator, wrong_thoughts=0.3, wrong_images=0.0)
        again = np.random.Generator(np.random.Philox())
        again.bit_generator.state = state
        scene = draw_scene(again, trained)
        objects = parse(row.thought)
        wrong += scene.wanted() != wanted(row.thought) or not scene.related(objects)
        assert (grid(objects) == row.cells).all(), "the image follows the thought, right or wrong"
    assert 0.22 < wrong / 400 < 0.38


def test_a_misread_scene_differs_and_can_be_laid_out():
    generator = rng("misread")
    for _ in range(300):
        scene = draw_scene(generator, trained)
        other = misread(scene, generator)
        # A slip of the relation alone changes nothing where there is none.
        assert other != scene or scene.relation is None
        assert other.other == scene.other
        assert other.kind != other.other
        assert other.related(lay_out(other, generator))


def test_a_spoiled_image_lacks_or_changes_at_most_one_object():
    generator = rng("spoil")
    changed = 0
    for _ in range(300):
        objects = lay_out(draw_scene(generator, trained), generator)
        spoiled = spoil(objects, generator)
        common = set(objects) & set(spoiled)
        assert len(common) >= len(objects) - 1
        assert len(spoiled) <= len(objects)
        changed += len(common) < len(objects)
    assert changed > 200


# --- prompts and thoughts ---------------------------------------------------------------------


def test_prompts_are_a_pure_function_of_seed_and_number(source):
    whole = source.train(0, 0, 50)
    assert source.train(0, 20, 10) == whole[20:30]
    assert source.train(1, 0, 50) != whole
    assert len({p.id for p in whole}) == 50
    assert source.held_out(20) == source.held_out(50)[:20]
    assert len({p.text for p in source.held_out(600)}) == 600


NUMBERS = {word: n + 1 for n, word in enumerate(("one", "two", "three", "four", "five", "six"))}


def solve(prompt):
    """What a prompt asks for, worked out from its words alone."""
    words = prompt.split()
    if words[0] == "half":
        count, words = NUMBERS[words[2]] // 2, words[3:]
    elif words[1] == "plus":
        count, words = NUMBERS[words[0]] + NUMBERS[words[2]], words[3:]
    elif words[1] == "minus":
        count, words = NUMBERS[words[0]] - NUMBERS[words[2]], words[3:]
    else:
        count, words = NUMBERS[words[0]], words[1:]
    if words[0] == "mix":
        mixed = {"blue yellow": "green", "blue red": "purple", "red yellow": "orange"}
        colour, words = mixed[" ".join(sorted((words[1], words[3])))], words[4:]
    else:
        colour, words = words[0], words[1:]
    if words[0] == "neither":
        (shape,) = set(SHAPES) - {words[1], words[3]}
        words = words[4:]
    else:
        shape, words = words[0], words[1:]
    if not words:
        return Scene(count, (colour, shape))
    relation = next(word for word in words[:-3] if word not in ("opposite", "of"))
    if words[0] == "opposite":
        swap = {"left": "right", "right": "left", "above": "below", "below": "above"}
        relation = swap[relation]
    return Scene(count, (colour, shape), relation, (words[-2], words[-1]))


def test_every_prompt_can_be_worked_out(source):
    """Reasoning from the words gives the scene that the judge has in mind."""
    forms = set()
    for prompt in (*source.train(0, 0, 1500), *source.held_out(300)):
        assert solve(prompt.text) == composition(prompt), prompt.text
        assert len(prompt.text.split()) <= 20
        riddles = ("half", "plus", "minus", "mix", "neither", "opposite")
        forms |= {word for word in riddles if word in prompt.text}
    assert len(forms) == 6


def test_thoughts_are_read_back():
    generator = rng("thoughts")
    for _ in range(200):
        scene = draw_scene(generator, anything)
        objects = lay_out(scene, generator)
        assert parse(think(objects)) == objects
        assert scene.related(objects)
        assert Counter(item.kind for item in objects) == scene.wanted()
        assert len(think(objects).split()) <= 12


@pytest.mark.parametrize(
    "thought",
    [
        "",
        "red",
        "red circle",
        "circle red top",
        "red circle top blue",
        "red circle top blue square top",
        "red red top",
        "two red circle",
        "red circle middle",
        "red circle top of blue square",
        "Red circle top",
    ],
)
def test_a_malformed_thought_lists_nothing(thought):
    assert parse(thought) is None


# --- the judge --------------------------------------------------------------------------------


def judged(objects, thought, scene=SCENE, change=None):
    """The verifier's score and its details for one image."""
    image = torch.from_numpy(draw(grid(objects)[None]))
    if change is not None:
        image = change(image)
    prompt = Prompt("x", "irrelevant", scene.metadata())
    batch = RewardBatch((prompt,), (thought,), image, ("x",))
    reward = REWARD.build(Options())
    found = {name: float(values[0]) for name, values in reward.details(batch).items()}
    return {"score": float(reward.score(batch)[0]), **found}


PERFECT = {"score": 1.0, "quality": 1.0, "thought": 1.0, "faithfulness": 1.0}


def test_a_perfect_drawing_and_thought_score_1():
    generator = rng("perfect")
    assert judged(DRAWN, think(DRAWN)) == pytest.approx(PERFECT, abs=1e-6)
    for _ in range(100):
        scene = draw_scene(generator, anything)
        objects = lay_out(scene, generator)
        assert judged(objects, think(objects), scene) == pytest.approx(PERFECT, abs=1e-6)


WRONG = {
    "one too few": DRAWN[:2],
    "one too many": [*DRAWN, Placed("red", "circle", 3)],
    "a stranger": [*DRAWN, Placed("green", "triangle", 8)],
    "colour": [DRAWN[0], replace(DRAWN[1], colour="green"), DRAWN[2]],
    "shape": [DRAWN[0], replace(DRAWN[1], shape="triangle"), DRAWN[2]],
    "relation": [replace(DRAWN[0], cell=1), *DRAWN[1:]],
    "other kind": [replace(DRAWN[0], colour="yellow"), *DRAWN[1:]],
    "nothing": [],
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_drawing_lowers_score_and_faithfulness_alone(wrong):
    found = judged(wrong, think(DRAWN))
    assert found["score"] < 0.9
    assert found["faithfulness"] < 0.9
    assert found["thought"] == pytest.approx(1)
    assert found["quality"] == pytest.approx(1)


@pytest.mark.parametrize("wrong", [w for w in WRONG.values() if w])
def test_a_wrong_thought_lowers_thought_and_faithfulness_alone(wrong):
    found = judged(DRAWN, think(wrong))
    assert found["thought"] < 0.9
    assert found["faithfulness"] < 0.9
    assert found["score"] == pytest.approx(1)
    assert found["quality"] == pytest.approx(1)


@pytest.mark.parametrize("wrong", [w for w in WRONG.values() if w])
def test_a_wrong_thought_that_is_followed_is_faithful(wrong):
    found = judged(wrong, think(wrong))
    assert found["faithfulness"] == pytest.approx(1)
    assert found["score"] < 0.9
    assert found["score"] == pytest.approx(found["thought"], abs=1e-6)


def test_a_wrong_relation_halves_the_score():
    found = judged(WRONG["relation"], think(WRONG["relation"]))
    assert found["score"] == pytest.approx(0.5)
    assert found["thought"] == pytest.approx(0.5)


def test_where_things_stand_matters_to_faithfulness_only():
    moved = [DRAWN[0], replace(DRAWN[1], cell=3), DRAWN[2]]
    found = judged(moved, think(DRAWN))
    assert found["score"] == pytest.approx(1)
    assert found["faithfulness"] == pytest.approx(2 / 3)


def test_noise_lowers_quality_and_with_it_the_score_alone():
    noise = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    before = PERFECT
    for level in (0.02, 0.05, 0.08):
        found = judged(DRAWN, think(DRAWN), change=lambda x, s=level: (x + s * noise).clamp(0, 1))
        assert found["quality"] < before["quality"] - 0.02
        assert found["score"] < before["score"] - 0.02
        assert found["faithfulness"] == pytest.approx(1)
        before = found


def test_a_malformed_thought_scores_nothing():
    found = judged(DRAWN, "red circle circle")
    assert (found["thought"], found["faithfulness"]) == (0, 0)
    assert found["score"] == pytest.approx(1)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_plain_images_get_next_to_nothing(value):
    found = judged(DRAWN, think(DRAWN), change=lambda x: torch.full_like(x, value))
    assert found["score"] < 0.05


def test_the_judge_reads_every_object_in_every_cell():
    for colour, shape, cell in product(COLOURS, SHAPES, range(9)):
        item = Placed(colour, shape, cell)
        (reading,) = read(torch.from_numpy(draw(grid([item])[None])))
        assert reading.objects == (item,)
        assert reading.quality == pytest.approx(1)
        assert PLACES[cell] in think([item])


def test_cells_and_words_of_place_agree():
    """A drawing at "topright" is at the top right of the picture."""
    image = draw(grid([Placed("yellow", "square", PLACES.index("topright"))])[None])[0]
    bright = image.sum(0)
    rows, columns = np.nonzero(bright > bright.min() + 0.5)
    assert rows.max() < 8
    assert columns.min() >= 16


def test_scores_do_not_depend_on_the_batch():
    prompt = Prompt("x", "irrelevant", SCENE.metadata())
    images = torch.from_numpy(draw(np.stack([grid(w) for w in WRONG.values()])))
    count = len(images)
    batch = RewardBatch((prompt,) * count, (think(DRAWN),) * count, images, ("k",) * count)
    reward = REWARD.build(Options())
    whole = reward.score(batch)
    for row, objects in enumerate(WRONG.values()):
        assert float(whole[row]) == pytest.approx(judged(objects, think(DRAWN))["score"], abs=1e-6)
    assert whole.dtype == torch.float32


def test_what_the_judge_needs_is_said(source):
    image = torch.zeros(1, 3, 24, 24)
    reward = REWARD.build(Options())
    with pytest.raises(UserError, match="metadata"):
        reward.score(RewardBatch((Prompt("x", "a cat"),), ("",), image, ("k",)))
    with pytest.raises(UserError, match="draws none"):
        reward.score(RewardBatch(source.train(0, 0, 1), ("",), None, ("k",)))
    with pytest.raises(UserError, match=r"24 x 24 pixels, but image.size is \[24, 8\]"):
        reward.score(RewardBatch(source.train(0, 0, 1), ("",), image[..., :8], ("k",)))


def test_prompts_say_what_is_asked_in_many_ways():
    generator = rng("ways")
    assert len({say(SCENE, generator) for _ in range(200)}) > 20


# --- the embedded checkpoint ------------------------------------------------------------------


def test_the_embedded_checkpoint_is_the_one_that_was_made():
    """Its weights were fixed before any setting of the training was tuned on them."""
    folder = Path(find_spec("unigrpo_board").origin).parent / "checkpoint"
    made = loads((folder / "made.json").read_text())
    assert sha256((folder / "ema.safetensors").read_bytes()).hexdigest() == made["sha256"]
    vocabulary = loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert set(WORDS) <= set(vocabulary)
    assert loads((folder / "llm_config.json").read_text())["vocab_size"] == len(vocabulary)
