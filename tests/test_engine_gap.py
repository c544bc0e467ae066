"""The gap between sampler and trainer: small when all is well, and faults are caught by it."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import Silent, image_of, lines, recipe, text_of, with_segment

from unigrpo_core.engine import loop
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


# --- planted faults ---------------------------------------------------------------------------


def run_with(monkeypatch, tmp_path, checkpoint, *overrides, tamper=None, prepare=None):
    """Trains one step while what was sampled for training, or the policy, is tampered with."""
    original = loop.sample

    def sample(setup, prompts, plan, key, *more):
        rollout = original(setup, prompts, plan, key, *more)
        return tamper(rollout) if tamper and plan.trained else rollout

    monkeypatch.setattr(loop, "sample", sample)
    resolved = recipe(tmp_path, checkpoint, "steps=1", *overrides)
    run = loop.Run(resolved, tmp_path / "run", Silent())
    if prepare:
        prepare(run.setup)
    before = {name: p.clone() for name, p in run.setup.policy.root.named_parameters()}
    try:
        run()
    except UserError:
        after = dict(run.setup.policy.root.named_parameters())
        assert all(torch.equal(p, before[name]) for name, p in after.items()), "it was trained"
        raise


def wrong_mean(rollout):
    return with_segment(rollout, old_mean=image_of(rollout).old_mean + 1e-3)


def wrong_noise(rollout):
    return with_segment(rollout, noise_level=image_of(rollout).noise_level * 1.05)


def wrong_time(rollout):
    return with_segment(rollout, t=image_of(rollout).t * 0.99)


def not_a_number(rollout):
    x_next = image_of(rollout).x_next.clone()
    x_next[-1, -1, 0, 0, 0] = float("nan")
    return with_segment(rollout, x_next=x_next)


def special_token(rollout):
    """As if the sampler had emitted a special token that the trainer excludes."""
    text = text_of(rollout)
    tokens = text.tokens.clone()
    tokens[-1, 0] = 3
    return with_segment(rollout, tokens=tokens)


def padding_counted(rollout):
    """As if the sampler's padding had been taken for sampled tokens."""
    text = text_of(rollout)
    assert not text.mask.all()
    return with_segment(rollout, mask=torch.ones_like(text.mask))


def other_temperature(rollout):
    return with_segment(rollout, logps=text_of(rollout).logps * 1.001)


def swapped_thoughts(rollout):
    text = text_of(rollout)
    return with_segment(rollout, tokens=text.tokens.flip(0), mask=text.mask.flip(0))


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize(
    ("tamper", "figure"),
    [
        (wrong_mean, "log-ratio"),
        (wrong_noise, "log-ratio"),
        (wrong_time, "log-ratio"),
        (not_a_number, "log-ratio"),
        (special_token, "delta log p"),
        (padding_counted, "delta log p"),
        (other_temperature, "delta log p"),
        (swapped_thoughts, "delta log p"),
    ],
)
def test_what_was_stored_is_what_is_compared(
    monkeypatch, tmp_path, checkpoint, tamper, figure, updates
):
    with pytest.raises(UserError, match="sampler and trainer disagree") as caught:
        run_with(monkeypatch, tmp_path, checkpoint, f"updates.count={updates}", tamper=tamper)
    assert figure in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def flipped_time(setup):
    """As a trainer would that takes t = 0 for noise."""

    def flip(module, arguments):
        (batch,) = arguments
        return (replace(batch, t=1 - batch.t),)

    setup.policy.root.register_forward_pre_hook(flip)


def dropout(setup):
    """A trainer that draws where the sampler does not: no two replays agree."""

    def drop(module, arguments, replay):
        noise = 1e-3 * torch.randn_like(replay.velocities)
        return replace(replay, velocities=replay.velocities + noise)

    setup.policy.root.register_forward_hook(drop)


@pytest.mark.parametrize(
    ("prepare", "figure"), [(flipped_time, "max |log-ratio|"), (dropout, "twice")]
)
def test_a_trainer_that_computes_otherwise(monkeypatch, tmp_path, checkpoint, prepare, figure):
    with pytest.raises(UserError, match="sampler and trainer disagree") as caught:
        run_with(monkeypatch, tmp_path, checkpoint, prepare=prepare)
    assert figure in str(caught.value)


def test_the_message_has_the_figures_by_time(monkeypatch, tmp_path, checkpoint):
    with pytest.raises(UserError) as caught:
        run_with(monkeypatch, tmp_path, checkpoint, tamper=wrong_mean)
    text = str(caught.value)
    assert "allowed" in text
    assert text.count("\n  t = ") == 2


# --- the arithmetic ---------------------------------------------------------------------------


def test_limits_of_text():
    stored, mask = torch.zeros(2, 50), torch.ones(2, 50).bool()
    gap = Gap("float32")
    gap.text(stored + 9e-6, stored, mask)
    assert not gap.problems()
    one = stored.clone()
    one[1, 3] = 2e-4
    gap = Gap("float32")
    gap.text(one, stored, mask)
    assert "max |delta log p| of text is 2.00e-04" in gap.problems()["text"]
    gap = Gap("float32")
    gap.text(stored + 2e-5, stored, mask)
    assert "mean |delta log p| of text" in gap.problems()["text"]
    gap = Gap("bf16")
    gap.text(stored + 0.01, stored, mask)
    assert not gap.problems()
    gap = Gap("float32")
    gap.text(one, stored, one == 0)  # what is not sampled does not count
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
