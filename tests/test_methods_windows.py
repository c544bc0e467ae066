"""Windows: which steps, how many, and what does not fit."""

from __future__ import annotations

from collections import Counter

import pytest
from pydantic import ValidationError
from unigrpo_methods.windows import fixed, random

from unigrpo_core.keys import Key


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
