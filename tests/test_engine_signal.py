"""The cosine between the gradients of an update's halves."""

import pytest
import tiny
import torch
from tiny import train_set
from torch import nn

from unigrpo_core.engine.signal import Signal, halves
from unigrpo_core.engine.update import Updater


def test_halves_are_whole_prompts():
    owner = torch.tensor([0, 0, 1, 1, 1, 2, 3, 4, 4])
    first, second = halves(torch.arange(9), owner)
    assert owner[first].tolist() == [0, 0, 1, 1, 1]
    assert owner[second].tolist() == [2, 3, 4, 4]
    some = torch.tensor([5, 6, 7, 8])
    assert [part.tolist() for part in halves(some, owner)] == [[5], [6, 7, 8]]


def test_one_prompt_has_no_halves():
    rows = torch.tensor([2, 3, 4])
    assert [part.tolist() for part in halves(rows, torch.tensor([0, 0, 1, 1, 1]))] == [[2, 3, 4]]


def test_the_cosine_of_known_gradients():
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    signal = Signal({"text": weights, "image": [nn.Parameter(torch.zeros(1))]})
    assert signal.metrics() == {}
    weights[0].grad = torch.tensor([3.0, 0.0])  # the first half: (3, 0, 0)
    signal.half()
    weights[0].grad += torch.tensor([1.0, 2.0])  # the second: (1, 2, 2)
    weights[1].grad = torch.tensor([2.0])
    assert signal.metrics() == {"text/grad_cosine": pytest.approx(3 / (3 * 3))}


def test_halves_that_are_alike_have_cosine_one_and_opposed_ones_minus_one(setup):
    """A rollout whose second half repeats the first, with advantages that are the same or half as
    large and of the other sign: then so are the gradients."""
    for factor, cosine in ((1.0, 1.0), (-0.5, -1.0)):
        built = setup(
            *("episode=['think']", "train=['text']", "group.fan_out=[3]"),
            *("prompts=2", "updates.count=1", "optimizer.signal_every=1"),
            "rewards=[{use='word'}]",
        )
        data = train_set(built)
        half = len(data.owner) // 2
        object.__setattr__(data, "prompts", data.prompts[:half] * 2)
        for name in ("tokens", "mask", "logps"):
            object.__setattr__(data, name, torch.cat([getattr(data, name)[:half]] * 2))
        object.__setattr__(data, "sizes", data.sizes[:half] * 2)
        advantages = torch.tensor([1.0, -0.5, 0.25])
        object.__setattr__(data, "text_advantages", torch.cat([advantages, factor * advantages]))
        assert Updater(built)(data)["text/grad_cosine"] == pytest.approx(cosine, abs=1e-3)


def test_it_is_measured_when_its_turn_comes_and_changes_the_update_by_rounding(train):
    plain = train("plain", "steps=3", "rewards=[{use='brightness'}]")
    measured = train(
        "measured", "steps=3", "rewards=[{use='brightness'}]", "optimizer.signal_every=2"
    )
    found = [
        sorted(name for name in row if name.endswith("grad_cosine")) for row in tiny.lines(measured)
    ]
    both = ["image/grad_cosine", "text/grad_cosine"]
    assert found == [both, [], both]
    assert all(-1 <= tiny.lines(measured)[0][name] <= 1 for name in both)
    assert not any("grad_cosine" in name for row in tiny.lines(plain) for name in row)
    for one, other in zip(tiny.lines(plain), tiny.lines(measured), strict=True):
        assert other["reward"] == pytest.approx(one["reward"], abs=1e-4)
        assert other["text/grad_norm"] == pytest.approx(one["text/grad_norm"], rel=1e-3)
