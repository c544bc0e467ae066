"""Rewards that need no model."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from unigrpo_rewards import brightness, random_reward

from unigrpo_core.plugin import Options
from unigrpo_core.records import Prompt, RewardBatch


def batch(images: torch.Tensor | None, keys: tuple[str, ...]) -> RewardBatch:
    prompts = tuple(Prompt(f"p{row}", "a red square") for row in range(len(keys)))
    return RewardBatch(prompts, ("",) * len(keys), images, keys)


def test_brightness_is_the_mean_pixel() -> None:
    reward = brightness.build(brightness.BrightnessOptions())
    images = torch.zeros(3, 3, 2, 2)
    images[1] = 1.0
    images[2, 0] = 1.0
    images.requires_grad_()
    score = reward.score(batch(images, ("a", "b", "c")))
    assert score.dtype == torch.float32
    assert score.tolist() == pytest.approx([0.0, 1.0, 1 / 3])
    assert brightness.PROVIDER.differentiable
    (gradient,) = torch.autograd.grad(score.sum(), images)
    assert torch.equal(gradient, torch.full_like(gradient, 1 / 12))
    assert reward.details(batch(images, ("a", "b", "c"))) == {}


def test_brightness_without_an_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="brightness"):
        brightness.build(brightness.BrightnessOptions()).score(batch(None, ("a",)))


def test_random_depends_on_the_key_only() -> None:
    score_of = random_reward.build(Options())
    keys = tuple(f"0/3/prompt/{row}" for row in range(2000))
    score = score_of(batch(None, keys))
    assert score.dtype == torch.float32
    assert ((score >= 0) & (score <= 1)).all()
    assert score.mean().item() == pytest.approx(0.5, abs=0.03)
    assert score.std().item() == pytest.approx(12**-0.5, abs=0.02)
    again = score_of(batch(torch.ones(3, 3, 2, 2), (keys[7], keys[1], keys[0])))
    assert torch.equal(again, score[[7, 1, 0]])
    assert random_reward.PROVIDER.reads == ()


@pytest.mark.parametrize("provider", [brightness.PROVIDER, random_reward.PROVIDER])
def test_rewards_have_no_options(provider) -> None:
    with pytest.raises(ValidationError, match="scale"):
        provider.options.model_validate({"scale": 1.0})


LISTING = """
import sys
from unigrpo_rewards import hooks

names = [provider.name for provider in (*hooks.unigrpo_rewards(), *hooks.unigrpo_prompts())]
assert names == ["brightness", "random", "pickscore", "pattern", "file"], names
for provider in list(hooks.unigrpo_rewards())[:2]:
    built = provider.build(provider.options())
    assert (provider.range or built.range) == (0.0, 1.0) and provider.summary
assert "torch" not in sys.modules
"""


def test_listing_and_building_import_nothing_heavy() -> None:
    result = subprocess.run([sys.executable, "-c", LISTING], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
