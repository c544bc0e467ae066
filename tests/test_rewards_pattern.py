"""The reward by rule: shares of characters and words, in bounded time."""

import time

import pytest
from pydantic import ValidationError
from unigrpo_rewards.pattern import PROVIDER, PatternOptions, build

from unigrpo_core.records import Prompt, RewardBatch


def scores(thoughts, **options):
    prompts = tuple(Prompt(f"p{row}", "a prompt") for row in range(len(thoughts)))
    keys = tuple(map(str, range(len(thoughts))))
    return build(PatternOptions(**options))(RewardBatch(prompts, thoughts, None, keys)).tolist()


def test_the_share_of_characters():
    found = scores(("12ab", "", "no", "7", "a\n1 "), pattern=r"\d")
    assert found == pytest.approx([0.5, 0, 0, 1, 0.25])


def test_the_share_of_words():
    numbers = r"\d+(\.\d+)?%?"
    found = scores(("12 or 3.5% of x7", " ", "8", "8."), pattern=numbers, per="word")
    assert found == pytest.approx([0.4, 0, 1, 0])


def test_a_word_that_is_too_long_does_not_match():
    assert scores(("a" * 64 + " b", "a" * 65 + " b"), pattern="a+", per="word") == [0.5, 0]


def test_without_a_thought_it_is_an_error():
    with pytest.raises(ValueError, match="'pattern' reads a thought"):
        build(PatternOptions(pattern="a"))(RewardBatch((Prompt("p", "x"),), None, None, ("k",)))
    assert PROVIDER.reads == ("thought",)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|aa)+b", "(?:(?:x*)*)*", "a*a*a*a*b", "a?" * 30, "((a|b|cc){9}){9}", "(a?){64}a"],
)
def test_a_pattern_that_could_try_for_ever_is_refused(pattern):
    with pytest.raises(ValidationError, match="may try without end"):
        PatternOptions(pattern=pattern)


@pytest.mark.parametrize("pattern", ["(", "[a", "*", r"\2", "a{9999999999999999999}"])
def test_what_is_no_pattern_is_told(pattern):
    with pytest.raises(ValidationError, match="no regular expression"):
        PatternOptions(pattern=pattern)


@pytest.mark.parametrize(
    "pattern", [r"a*a*b", r"\w*\w*[^\w]", r"(?:a|b)*c", r"(?=(a*))\1b", r"a*(?:b|a)a*c"]
)
def test_what_is_allowed_is_quick(pattern):
    """A word is matched in some hundredths of a second at worst; this bounds seconds."""
    start = time.process_time()
    scores(
        tuple("a" * (60 + row % 5) + "b" * (row % 2) for row in range(8)),
        pattern=pattern,
        per="word",
    )
    assert time.process_time() - start < 5


def test_usual_patterns_are_allowed():
    for pattern in (
        r"[A-Z][a-z]+[.,]?",
        r"(?i:yes|no)",
        r"\w{2,5}-\w+",
        r"(?>a+)b",
        r"(a)(?(1)b|c)",
    ):
        PatternOptions(pattern=pattern)
