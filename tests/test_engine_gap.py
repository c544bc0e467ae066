"""The gap between sampler and trainer: small when all is well, and how it is reckoned.

That faults are caught by it is in test_faults.py.
"""

import math

import pytest
import torch
from tiny import lines

from unigrpo_core.engine.gap import Gap, finite
from unigrpo_core.errors import UserError

CLIP = 5.1e-4 / math.sqrt(2 * 3 * 48)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("image.noise_scope='thought'", "group.fan_out=[2, 2]"),
        ("image.guidance={use='cfg', scale=3.0}",),
        ("updates.count=1",),
        ("compute.replay_tokens=1",),
        ("text.temperature=0.7",),
        ("policy.system_prompt='mix red and blue'", "image.guidance={use='cfg'}"),
    ],
)
def test_figures_of_a_healthy_run(train, overrides):
    """Law 3's limits, on every step; the second follows weights that have been trained."""
    for figures in lines(train("run", *overrides)):
        assert figures["gap/text_mean"] <= 1e-5
        assert 0 < figures["gap/text_max"] <= 1e-4
        assert 0 < figures["gap/image_log_ratio"] <= min(1e-6, 0.05 * CLIP)
        assert figures["gap/trainer_twice"] <= 0.05 * CLIP


# --- the arithmetic ---------------------------------------------------------------------------


def test_limits_of_text():
    stored, mask = torch.zeros(2, 50), torch.ones(2, 50).bool()
    gap = Gap("float32")
    gap.text(stored + 9e-6, stored, mask)
    assert not gap.problems()
    two = stored.clone()
    two[1, 3] = two[0, 7] = 2e-4
    gap = Gap("float32")
    gap.text(two, stored, mask)
    assert gap.problems()["text"] == "max |delta log p| of text is 2.00e-04, allowed 1.00e-04"
    one = stored.clone()
    one[1, 3] = 2e-4  # one token may be where rounding is amplified, up to ten times the limit
    gap = Gap("float32")
    gap.text(one, stored, mask)
    assert not gap.problems()
    assert gap.metrics()["gap/text_beyond"] == 1
    for _ in range(20):
        gap.text(stored, stored, mask)
    gap.text(one, stored, mask)
    assert not gap.problems()  # 2 of 2,200
    gap.text(two, stored, mask)
    assert "allowed 1.00e-04" in gap.problems()["text"]  # 4 of 2,300
    one[1, 3] = 2e-3
    gap = Gap("float32")
    gap.text(one, stored, mask)
    assert (
        gap.problems()["text"]
        == "mean |delta log p| of text is 2.00e-05, allowed 1.00e-05; max |delta log p| of text "
        "is 2.00e-03, allowed 1.00e-03"
    )
    gap = Gap("float32")
    gap.text(stored + 2e-5, stored, mask)
    assert "mean |delta log p| of text" in gap.problems()["text"]
    gap = Gap("bf16")
    gap.text(stored + 0.01, stored, mask)
    assert not gap.problems()
    gap = Gap("float32")
    gap.text(two, stored, two == 0)  # what is not sampled does not count
    assert not gap.problems()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nothing_infinite_hides(value):
    stored, mask = torch.zeros(1, 3), torch.ones(1, 3).bool()
    bad = torch.tensor([[0.0, value, 0.0]])
    gap = Gap("float32")
    gap.text(bad, stored, mask)
    gap.text(stored, stored, mask)
    assert list(gap.problems()) == ["text"]
    with pytest.raises(UserError, match="the loss is not finite"):
        finite("the loss", bad)
    finite("the loss", stored)
