"""The names of scores, from the typed recipe and from a run folder's values alike."""

import pytest
import tiny

from unigrpo_core.recipe.scored import score_names, scored


@pytest.mark.parametrize(
    ("rewards", "monitors", "names"),
    [
        ("[{use='word'}]", "[]", ["word"]),
        ("[{use='word', weight=0.5}]", "[{use='word'}]", ["word"]),
        ("[{use='word'}]", "[{use='tiny-tests:word'}]", ["word"]),
        ("[{use='word'}]", "[{use='word', word='green'}]", ["word", "word#2"]),
        (
            "[{use='word'}, {use='random'}, {use='word', word='a'}]",
            "[{use='word', word='a'}, {use='brightness'}, {use='word', word='b'}]",
            ["word", "random", "word#2", "brightness", "word#3"],
        ),
    ],
)
def test_both_ways_to_the_names_agree(tmp_path, checkpoint, rewards, monitors, names):
    resolved = tiny.recipe(tmp_path, checkpoint, f"rewards={rewards}", f"monitors={monitors}")
    typed, plain = scored(resolved.recipe), score_names(resolved.values)
    assert [*typed] == [*plain] == names
    for name, slot in typed.items():
        values, kind = plain[name]
        assert values["use"] == slot.use
        assert kind == ("reward" if slot in resolved.recipe.rewards else "monitor")
        assert values.get("word", "red") == getattr(slot.options, "word", "red")
