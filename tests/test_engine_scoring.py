"""From rewards to advantages over a forest, and rewards that break their interface."""

from dataclasses import replace

import pytest
import torch
from tiny import prompts

from unigrpo_core.engine.rollout import Plan, sample
from unigrpo_core.engine.scoring import Scores, advantages, episodes, equal_groups, score
from unigrpo_core.errors import PluginError
from unigrpo_core.keys import Key
from unigrpo_core.records import ImageSegment, RewardBatch, Rollout, TextSegment

NOTHING = torch.zeros(0)


def forest(fan_out=(2, 3), count=2):
    """A rollout of which only the shape matters."""
    parents, rows = [], count
    for width in fan_out:
        parents.append(torch.arange(rows).repeat_interleave(width))
        rows *= width
    text = TextSegment(NOTHING, NOTHING, NOTHING, tuple(f"t{i}" for i in range(len(parents[0]))))
    image = ImageSegment(*(NOTHING,) * 7, images=torch.zeros(rows, 3, 4, 4))
    return Rollout(prompts(count), (text, image)[: len(fan_out)], tuple(parents))


def scores(*columns, weights=None):
    values = torch.tensor(columns).T.contiguous()
    names = tuple(f"r{i}" for i in range(values.shape[1]))
    return Scores(names, values, torch.tensor(weights or [1.0] * len(names)), {})


def normal(values):
    """(x - mean) / population std, per row."""
    x = torch.as_tensor(values).double()
    return ((x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, correction=0)).float()


EPISODES = [0.1, 0.5, 0.3, 0.9, 0.2, 0.7, 0.4, 0.4, 0.8, 0.0, 0.6, 0.5]  # [2 prompts, 2, 3]


@pytest.fixture
def branching(setup):
    return lambda *more: setup("group.fan_out=[2, 3]", *more)


def close(got, expected):
    torch.testing.assert_close(got, expected.flatten(), atol=2e-5, rtol=1e-4)


def test_a_thought_scores_the_mean_of_its_images(branching):
    got = advantages(branching(), forest(), scores(EPISODES), 0)
    means = torch.tensor(EPISODES).view(2, 2, 3).mean(2)
    close(got, normal(means))


def test_images_are_compared_within_their_prompt(branching):
    got = advantages(branching(), forest(), scores(EPISODES), 1)
    close(got, normal(torch.tensor(EPISODES).view(2, 6)))


def test_images_compared_with_their_siblings(branching):
    got = advantages(branching("image.group_by='siblings'"), forest(), scores(EPISODES), 1)
    close(got, normal(torch.tensor(EPISODES).view(4, 3)))


def test_thoughts_scored_by_the_mean_of_normalized_rewards(branching):
    built = branching("advantage.descendants='normalize_then_mean'")
    got = advantages(built, forest(), scores(EPISODES), 0)
    close(got, normal(torch.tensor(EPISODES).view(2, 6)).view(2, 2, 3).mean(2))
    other = advantages(branching(), forest(), scores(EPISODES), 0)
    assert not torch.allclose(got, other, atol=1e-2)
    # A leaf is its own only descendant: both modes agree.
    leaf = [advantages(b, forest(), scores(EPISODES), 1) for b in (built, branching())]
    torch.testing.assert_close(leaf[0], leaf[1])


def test_one_image_per_thought_gives_both_the_same_advantage(setup):
    built, rollout = setup(), forest((3, 1), 2)
    values = scores(EPISODES[:6])
    first, second = (advantages(built, rollout, values, level) for level in (0, 1))
    torch.testing.assert_close(first, second)


def test_rewards_count_by_their_weight(branching):
    noise = [float(i * i % 7) for i in range(12)]
    built = branching()
    alone = advantages(built, forest(), scores(EPISODES), 0)
    with_zero = advantages(built, forest(), scores(EPISODES, noise, weights=[1.0, 0.0]), 0)
    assert torch.equal(alone, with_zero)
    mixed = scores(EPISODES, noise, weights=[2.0, -1.0])
    total = 2 * torch.tensor(EPISODES) - torch.tensor(noise)
    torch.testing.assert_close(mixed.total, total)
    close(advantages(built, forest(), mixed, 0), normal(total.view(2, 2, 3).mean(2)))


def test_equal_groups_are_counted_and_teach_nothing(branching):
    values = [0.3] * 6 + EPISODES[6:]
    assert shares(branching(), values) == {"text/equal_groups": 0.5, "image/equal_groups": 0.5}
    assert shares(branching(), EPISODES) == {"text/equal_groups": 0.0, "image/equal_groups": 0.0}
    for level, rows in ((0, 2), (1, 6)):
        got = advantages(branching(), forest(), scores(values), level)
        assert got[:rows].eq(0).all()
        assert got[rows:].ne(0).any()


def shares(setup_, values):
    return equal_groups(setup_.recipe, forest(), scores(values))


def test_equal_groups_are_those_of_each_expert(branching):
    """Thoughts have equal means though their images differ, and the other way round."""
    means = [0.1, 0.5, 0.3, 0.5, 0.3, 0.1, *EPISODES[6:]]
    assert shares(branching(), means) == {"text/equal_groups": 0.5, "image/equal_groups": 0.0}
    siblings = [0.2] * 3 + [0.9] * 3 + EPISODES[6:]
    assert shares(branching(), siblings) == {"text/equal_groups": 0.0, "image/equal_groups": 0.0}
    built = branching("image.group_by='siblings'")
    assert shares(built, siblings) == {"text/equal_groups": 0.0, "image/equal_groups": 0.5}
    assert shares(branching("train=['image']"), means) == {"image/equal_groups": 0.0}


# --- rewards ----------------------------------------------------------------------------------


def batch_of(setup_):
    rollout = sample(
        setup_,
        prompts(2),
        Plan(setup_.recipe.episode, (3, 1), setup_.training, ()),
        Key(("scoring",)),
    )
    return episodes(rollout, "scoring")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", "reward 'faulty' of tiny-tests 0.1 failed: RuntimeError: the judge is down"),
        ("nan", r"reward 'faulty' of tiny-tests 0.1 returned nan for 1 of 6 .* prompt 'p1'"),
        ("length", r"reward 'faulty' of tiny-tests 0.1 returned \(5,\), expected .*\(6,\)"),
        ("range", r"reward 'faulty' of tiny-tests 0.1 returned 1.5, outside of .*\[0.0, 1.0\]"),
        ("list", r"reward 'faulty' of tiny-tests 0.1 returned list, expected .*\(6,\)"),
    ],
)
def test_a_faulty_reward_is_named_with_its_distribution(setup, fault, message):
    built = setup(f"rewards=[{{use='faulty', fault='{fault}'}}]")
    with pytest.raises(PluginError, match=message) as caught:
        score(built.rewards, batch_of(built), details=False)
    assert caught.value.exit_code == 3


def test_a_faulty_reward_of_weight_0_stops_the_run_too(setup):
    built = setup("rewards=[{use='random'}, {use='faulty', fault='nan', weight=0.0}]")
    with pytest.raises(PluginError, match="faulty"):
        score(built.rewards, batch_of(built), details=False)


@pytest.mark.parametrize(
    ("detail", "message"),
    [
        (torch.zeros(5), r"detail 'extra' \(5,\), expected .*\(6,\)"),
        (torch.zeros(6, 1), r"detail 'extra' \(6, 1\), expected .*\(6,\)"),
        (torch.tensor([0.0] * 5 + [float("inf")]), "detail 'extra' inf for 1 of 6 .* prompt 'p1'"),
        ([0.0] * 6, r"detail 'extra' list, expected .*\(6,\)"),
    ],
)
def test_a_faulty_detail_is_named_with_its_reward(setup, monkeypatch, detail, message):
    built = setup("rewards=[{use='word'}]")
    monkeypatch.setattr(
        type(built.rewards[0].reward), "details", lambda self, batch: {"extra": detail}
    )
    with pytest.raises(PluginError, match=f"reward 'word' of tiny-tests 0.1 .*{message}"):
        score(built.rewards, batch_of(built), details=True)


def test_scores_have_a_column_per_reward_and_names_of_their_own(setup):
    built = setup(
        "rewards=[{use='word', word='red'}, {use='word', word='top', weight=0.5}, {use='random'}]"
    )
    batch = batch_of(built)
    found = score(built.rewards, batch, details=True)
    assert found.names == ("word", "word#2", "random")
    assert found.values.shape == (6, 3)
    assert found.weights.tolist() == [1.0, 0.5, 1.0]
    shares = [t.split().count("top") / max(1, len(t.split())) for t in batch.thoughts]
    assert found.values[:, 1].tolist() == pytest.approx(shares)


def test_a_function_is_a_reward(setup):
    built = setup("rewards=[{use='first_pixel'}]")
    batch = batch_of(built)
    found = score(built.rewards, batch, details=True)
    torch.testing.assert_close(found.values[:, 0], batch.images[:, 0, 0, 0].cpu() + 2)
    assert found.details == {}
    brighter = replace(batch, images=batch.images + 5)
    with pytest.raises(PluginError, match=r"'first_pixel' .* outside of its range \[2.0, 3.0\]"):
        score(built.rewards, brighter, details=False)


def test_a_reward_does_not_depend_on_the_other_rows(setup):
    built = setup("rewards=[{use='random'}, {use='brightness'}]")
    batch = batch_of(built)
    whole = score(built.rewards, batch, details=False).values
    for row in (0, 5):
        single = RewardBatch(
            batch.prompts[row : row + 1],
            batch.thoughts[row : row + 1],
            batch.images[row : row + 1],
            batch.keys[row : row + 1],
        )
        torch.testing.assert_close(
            score(built.rewards, single, details=False).values[0], whole[row]
        )
