"""Objectives at fresh points, and of a graded score: a step of the tiny model by each."""

import math

import pytest
import tiny
import torch
from safetensors.torch import load_file

FRESH = ("image.scheduler={use='ode', steps=4}",)
BRIGHT = ("rewards=[{use='brightness'}]",)
AVERAGE = ("ema={decay=0.5, sample=true}", "steps=2")

METHODS = {
    "diffusion_nft": ("image.objective={use='diffusion_nft', times=2, beta=1.0}", *FRESH, *AVERAGE),
    "awm": ("image.objective={use='awm', weighting='t', power=0.25}", *FRESH),
    "fpo": ("image.objective={use='fpo', density='logit_normal'}", *FRESH),
    "refl": (
        "image.objective={use='refl'}",
        "image.scheduler={use='ode', steps=4}",
        "image.window={use='random', size=1, range=[2, 4]}",
    ),
}
SHOWN = {
    "diffusion_nft": {"optimality", "positive_error", "negative_error"},
    "awm": {"clip_fraction", "ratio_deviation", "matching_error"},
    "fpo": {"clip_fraction", "ratio_deviation", "matching_error"},
    "refl": {"score"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", METHODS)
def test_a_step_moves_the_image_expert(checkpoint, tmp_path, name):
    run = tiny.run(tmp_path, checkpoint, "steps=1", *BRIGHT, *METHODS[name])
    last = [line for line in tiny.lines(run) if "image/loss" in line][-1]
    assert {f"image/{metric}" for metric in SHOWN[name]} <= last.keys()
    assert all(math.isfinite(figure) for figure in last.values())
    before, after = load_file(checkpoint / "ema.safetensors"), tiny.final_weights(run)
    moved = [name for name, weight in before.items() if not torch.equal(after[name], weight)]
    assert any(map(tiny.is_image, moved))


def test_one_image_a_prompt_is_enough_for_the_score(checkpoint, tmp_path):
    """It is compared with no other image, so its advantage of 0 does not matter."""
    alone = ("episode=['draw']", "train=['image']", "group.fan_out=[1]", "steps=1")
    run = tiny.run(tmp_path, checkpoint, *alone, *BRIGHT, *METHODS["refl"])
    [step] = tiny.lines(run)
    assert step["image/grad_norm"] > 0
    assert step["reward_std"] == 0
