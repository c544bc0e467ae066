"""Colorfulness against hand-computed cases."""

import pytest
import torch
from unigrpo_reward_colorfulness import unigrpo_rewards

from unigrpo_core.records import Prompt, RewardBatch
from unigrpo_core.testing import RewardConformance

RED, CYAN, BLUE, GREY = (1.0, 0.0, 0.0), (0.0, 1.0, 1.0), (0.0, 0.0, 1.0), (0.5, 0.5, 0.5)


def score(*images):
    """The scores of images, each a list of pixels."""
    [provider] = unigrpo_rewards()
    pixels = torch.tensor(images).permute(0, 2, 1).unsqueeze(2)
    prompts = tuple(Prompt(str(row), "anything") for row in range(len(images)))
    batch = RewardBatch(prompts, None, pixels, tuple(map(str, range(len(images)))))
    return provider.build(provider.options())(batch)


def test_one_color_has_no_spread():
    found = score([GREY] * 4, [BLUE] * 4, [RED] * 4)
    bound = (1.25 * 1.09) ** 0.5
    # blue: rg 0, yb -1; red: rg 1, yb .5
    assert found.tolist() == pytest.approx([0.0, 0.3 / bound, 0.3 * 1.25**0.5 / bound])
    assert found.dtype == torch.float32


def test_red_beside_cyan():
    # rg = 1, -1 and yb = .5, -.5: mean 0, variances 1 and .25
    assert score([RED, CYAN]).item() == pytest.approx(1 / 1.09**0.5)


def test_the_bound_is_reached():
    # mean over std is best at .3: a share p of red with (2p - 1)^2 = .09 / 1.09
    share = round(1000 * (1 + (0.09 / 1.09) ** 0.5) / 2)
    found = score([RED] * share + [CYAN] * (1000 - share)).item()
    assert 0.9999 < found <= 1 + 1e-6


def test_rows_do_not_touch_each_other():
    both = score([RED, GREY], [BLUE, CYAN])
    assert torch.equal(both, torch.cat([score([RED, GREY]), score([BLUE, CYAN])]))


class TestConformance(RewardConformance):
    """What every reward promises; found by its entry point, as a recipe would."""

    use = "colorfulness"
