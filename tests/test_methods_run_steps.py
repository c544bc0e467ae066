"""One step of a tiny model with each method that trains the sampler's stochastic steps."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from safetensors.torch import load_file

from unigrpo_core.errors import UserError

DANCE = 'image.scheduler={use="dance_sde",steps=4,noise_level=0.3}'
CPS = 'image.scheduler={use="cps",steps=4,noise_level=0.8}'
SCATTERED = 'image.window={use="scattered",size=2,range=[0,4]}'
SLIDING = 'image.window={use="sliding",size=2,end=3,every=1}'
ALL = 'image.window={use="all"}'
NOT_THE_LAST = 'image.window={use="all",last=false}'
IN_NATS = '{use="flow_grpo",ratio_norm=false,clip_range=1e-4}'
IN_SQUARES = '{use="flow_grpo",ratio_norm=false,clip_range=1e-3,clip_unit="latent^2"}'

STEPS = {
    "tempflow": ('image.objective={use="tempflow",clip_range=1e-3}', DANCE, SCATTERED),
    "grpo_guard": ('image.objective={use="grpo_guard"}', ALL),
    "flow_dppo": ('image.objective={use="flow_dppo"}', CPS, SLIDING),
    "flow_grpo": (f"image.objective={IN_SQUARES}", CPS, NOT_THE_LAST),
    "latent_kl": ('image.regularizers=[{use="latent_kl",form="without_dt",weight=0.1}]', CPS),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", STEPS)
def test_one_step(checkpoint, tmp_path, name):
    run = tiny.run(tmp_path, checkpoint, "steps=1", "train=['image']", *STEPS[name])
    (figures,) = (line for line in tiny.lines(run) if "image/loss" in line)
    assert all(math.isfinite(figure) for figure in figures.values())
    assert figures["image/grad_norm"] > 0
    before, after = load_file(checkpoint / "ema.safetensors"), tiny.final_weights(run)
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())


def test_mixgrpo_with_a_full_window_is_flow_grpo(checkpoint, tmp_path):
    given = ("steps=1", "train=['image']", f"image.objective={IN_NATS}")
    full = tiny.run(tmp_path, checkpoint, *given, 'image.window={use="sliding"}', name="full")
    every = tiny.run(tmp_path, checkpoint, *given, ALL, name="every")
    assert tiny.lines(full) == tiny.lines(every)


def test_a_window_with_the_last_step_of_cps_is_refused(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"has no noise, and this window has rollout 1 train on it"):
        tiny.run(tmp_path, checkpoint, "steps=1", "train=['image']", CPS, ALL)
