"""Windows: which steps, how many, and what does not fit."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from pydantic import ValidationError
from unigrpo_methods.windows import fixed, random, scattered, sliding, whole

from unigrpo_core.interfaces import Window
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Options


def test_the_random_window_of_the_paper_begins_at_0_1_or_2() -> None:
    window = random.build(random.RandomOptions(size=3, range=(0, 5)))
    drawn = Counter(window.steps(25, Key((seed, "window")), 1) for seed in range(600))
    assert set(drawn) == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}
    assert all(150 < times < 250 for times in drawn.values())
    assert window.count(25) == 3
    assert window.steps(25, Key((7,)), 1) == window.steps(25, Key((7,)), 1)


def test_a_random_window_can_fill_its_range() -> None:
    window = random.build(random.RandomOptions(size=2, range=(4, 6)))
    assert {window.steps(6, Key((seed,)), 1) for seed in range(9)} == {(4, 5)}


def test_the_fixed_window_is_its_steps() -> None:
    window = fixed.build(fixed.FixedOptions.model_validate_json('{"steps": [0, 2, 7]}'))
    assert window.steps(8, Key((0,)), 1) == window.steps(8, Key((1,)), 1) == (0, 2, 7)
    assert window.count(8) == 3


def test_windows_that_do_not_fit_say_so() -> None:
    with pytest.raises(ValueError, match=r"range \[0, 5\) does not fit: a rollout has 4 steps"):
        random.build(random.RandomOptions()).count(4)
    with pytest.raises(ValueError, match=r"step 4 does not exist: .* 4 steps, numbered 0 to 3"):
        fixed.build(fixed.FixedOptions(steps=(1, 4))).steps(4, Key((0,)), 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 0}, "size"),
        ({"size": 6, "range": (0, 5)}, r"size 6 does not fit into range \[0, 5\)"),
        ({"range": (3, 3)}, "0 <= lo < hi"),
        ({"range": (-1, 3)}, "0 <= lo < hi"),
        ({"begin": 0}, "begin"),
    ],
)
def test_wrong_random_options(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        random.RandomOptions.model_validate(given)


@pytest.mark.parametrize("steps", [(), (2, 1), (1, 1), (-1, 0)])
def test_wrong_fixed_options(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="steps"):
        fixed.FixedOptions(steps=steps)


def test_the_sliding_window_of_mixgrpo_moves_every_25_rollouts_and_stays_at_the_end() -> None:
    window = sliding.build(sliding.SlidingOptions())
    begins = [window.steps(25, Key((0,)), rollout)[0] for rollout in range(1, 701)]
    assert begins == [min((rollout - 1) // 25, 21) for rollout in range(1, 701)]
    assert window.steps(25, Key((0,)), 700) == (21, 22, 23, 24)
    assert window.count(25) == 4


def test_a_sliding_window_keeps_inside_its_ends() -> None:
    options = sliding.SlidingOptions(size=2, begin=1, end=6, stride=2, every=1)
    window = sliding.build(options)
    found = [window.steps(8, Key((0,)), rollout) for rollout in (1, 2, 3, 4)]
    assert found == [(1, 2), (3, 4), (4, 5), (4, 5)]


def test_a_sliding_window_of_all_steps_is_every_step_and_so_is_the_window_all() -> None:
    for total in (1, 8, 25):
        full = sliding.build(sliding.SlidingOptions(size=total))
        every = whole.build(whole.WholeOptions())
        for rollout in (1, 26, 1000):
            expected = tuple(range(total))
            assert full.steps(total, Key((rollout,)), rollout) == expected
            assert every.steps(total, Key((rollout,)), rollout) == expected
    assert whole.build(whole.WholeOptions(last=False)).steps(4, Key((0,)), 1) == (0, 1, 2)


def test_scattered_steps_are_every_subset_alike() -> None:
    window = scattered.build(scattered.ScatteredOptions(size=2, range=(1, 5)))
    drawn = Counter(window.steps(8, Key((seed, "window")), 1) for seed in range(1200))
    assert set(drawn) == set(combinations(range(1, 5), 2))
    assert all(150 < times < 250 for times in drawn.values())
    assert window.count(8) == 2


@pytest.mark.parametrize(
    ("window", "total", "message"),
    [
        (sliding.build(sliding.SlidingOptions()), 3, "4 steps from step 0 on do not fit: .* 3"),
        (sliding.build(sliding.SlidingOptions(end=9)), 8, "end 9 does not exist: .* 8 steps"),
        (scattered.build(scattered.ScatteredOptions()), 4, r"range \[0, 5\) does not fit: .* 4"),
        (whole.build(whole.WholeOptions(last=False)), 1, "no step to train: last = false"),
    ],
)
def test_what_does_not_fit_says_so(window: Window, total: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        window.count(total)


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        (sliding.SlidingOptions, {"size": 3, "begin": 2, "end": 4}, "size 3 does not fit between"),
        (sliding.SlidingOptions, {"every": 0}, "every"),
        (sliding.SlidingOptions, {"range": (0, 5)}, "range"),
        (scattered.ScatteredOptions, {"size": 6}, r"size 6 does not fit into range"),
        (scattered.ScatteredOptions, {"range": (3, 3)}, "0 <= lo < hi"),
        (whole.WholeOptions, {"size": 3}, "size"),
    ],
)
def test_wrong_options(options: type[Options], given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        options.model_validate(given)
