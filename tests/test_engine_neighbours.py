"""What neighbouring methods ask of the engine: moving averages, turns, dynamic sampling, budgets,
and scores with a gradient."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch
from tiny import lines

from unigrpo_core.engine.scoring import Scores, graded
from unigrpo_core.engine.selfcheck import self_check
from unigrpo_core.engine.update import Updater
from unigrpo_core.errors import PluginError, UserError

MSE = "image.regularizers=[{use='velocity_mse', weight=1.0, anchor='ema'}]"
DRAWS = ("episode=['draw']", "train=['image']", "group.fan_out=[3]")


# --- moving averages --------------------------------------------------------------------------


def copies(policy):
    return {name: p.detach().clone() for name, p in policy.root.named_parameters()}


def test_the_average_moves_once_a_rollout_by_its_decay(checkpoint, tmp_path):
    slow = ("ema={decay=0.75, slope=0.25}", "updates.count=1", MSE)
    built = tiny.setup(tmp_path, checkpoint, *slow)
    updater, policy = Updater(built), built.policy
    expected = copies(policy)
    for step, decay in ((1, 0.25), (2, 0.5), (3, 0.75), (4, 0.75)):
        updater(tiny.train_set(built, step))
        for name, now in copies(policy).items():
            expected[name] = expected[name].lerp(now, 1 - decay)
        with policy.weights("ema"):
            found = copies(policy)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-7, rtol=1e-6, msg=name)


def test_an_average_is_an_anchor(checkpoint, tmp_path):
    """In the first rollout it is what is trained, later what was trained before."""
    run = tiny.run(tmp_path, checkpoint, MSE, "ema.decay=0.9", "updates.count=1")
    first, second = (line["image/velocity_mse"] for line in lines(run))
    assert first == 0
    assert second > 0


def test_rollouts_are_sampled_by_the_average(checkpoint, tmp_path):
    """With a decay that leaves nothing of the new weights, every rollout of prompts is that of the
    weights of the start, whatever was learned: thoughts are as they were."""
    slow = ("ema={decay=0.999999, sample=true}", "steps=3", "text.lr=0.02", "image.lr=0.02")
    built = tiny.setup(tmp_path, checkpoint, *slow)
    updater = Updater(built)
    start = tiny.train_set(built, 5)
    gaps = [updater(tiny.train_set(built, step)) for step in (1, 2, 3)]
    again = tiny.train_set(built, 5)
    assert torch.equal(start.tokens, again.tokens)
    assert torch.allclose(start.points.x_next, again.points.x_next, atol=1e-3)
    # The gap is that of the weights that sampled, and so no larger than rounding.
    assert all(found["gap/text_max"] < 1e-4 for found in gaps)
    # What is trained has moved away from them: its ratios are not 1.
    assert gaps[-1]["text/ratio_deviation"] > 1e-3


def test_the_trainer_is_compared_with_itself_where_the_average_samples(checkpoint, tmp_path):
    """Velocities that change from the third forward on: the average's, the update's, and again."""
    built = tiny.setup(tmp_path, checkpoint, "ema={decay=0.5, sample=true}", "updates.count=1")
    calls = []

    def drift(module, args, replay):
        calls.append(1)
        return replace(replay, velocities=replay.velocities + 0.01 * (len(calls) > 2))

    built.policy.root.register_forward_hook(drift)
    with pytest.raises(UserError, match="the trainer's own image log-ratio, twice"):
        Updater(built)(tiny.train_set(built))


def test_signal_is_measured_where_the_average_samples(checkpoint, tmp_path):
    built = tiny.setup(
        tmp_path, checkpoint, "ema={decay=0.5, sample=true}", "optimizer.signal_every=1"
    )
    assert "text/grad_cosine" in Updater(built)(tiny.train_set(built))


# --- turns ------------------------------------------------------------------------------------


def test_experts_train_in_turn(checkpoint, tmp_path):
    """A text step, then two image steps, then text again; who is not in turn stands still."""
    turns = ("updates.turns={text=1, image=2}", "updates.count=1")
    built = tiny.setup(tmp_path, checkpoint, *turns)
    updater = Updater(built)
    for step, expert in enumerate(("text", "image", "image", "text"), 1):
        before = {n: p for e in updater.experts for n, p in named(built, e)}
        metrics = updater(tiny.train_set(built, step))
        moved = {n for e in updater.experts for n, p in named(built, e) if (p != before[n]).any()}
        assert moved
        assert moved <= {n for n, _ in named(built, expert)}, step
        assert {key.partition("/")[0] for key in metrics} - {"gap"} == {expert}


def test_both_turns_warm_up_and_hold_the_reference_still(checkpoint, tmp_path):
    """The image's first update is its own first, whatever the text's steps before."""
    turns = ("updates.turns={text=2, image=1}", "updates.count=1", "optimizer.warmup_updates=4")
    pull = "image.regularizers=[{use='velocity_mse', weight=1.0}]"
    built = tiny.setup(tmp_path, checkpoint, *turns, pull, "text.lr=0.1", "image.lr=0.1")
    updater, rates, looked = Updater(built), [], []
    check = updater._check_reference
    updater._check_reference = lambda *args: (looked.append(1), check(*args))
    for step in (1, 2, 3):
        updater(tiny.train_set(built, step))
        groups = {group["expert"]: group["lr"] for group in updater.optimizer.param_groups}
        rates.append((groups["text"], groups["image"], len(looked)))
    assert rates == [(0.025, 0, 1), (0.05, 0, 1), (0.05, 0.025, 2)]


def test_the_self_check_counts_what_is_dropped(checkpoint, tmp_path):
    drop = (SOLVED, "group.equal='drop'", "prompts=6")
    found = {f.name: f.figures for f in self_check(tiny.recipe(tmp_path, checkpoint, *drop))}
    kept = int(found["samples"].partition("of which ")[2].split()[0])
    assert 0 < kept < 6
    assert found["text groups"].startswith(f"{1 - kept / 6:.0%} have one and the same reward")


def test_the_self_check_looks_at_both_turns(checkpoint, tmp_path):
    found = self_check(tiny.recipe(tmp_path, checkpoint, "updates.turns={text=2, image=1}"))
    assert {"text step", "image step", "images, sampler against trainer"} <= {f.name for f in found}


def test_signal_is_that_of_the_turn(checkpoint, tmp_path):
    """An image update has a gradient of the text expert too, which makes no step."""
    turns = ("updates.turns={text=1, image=1}", "optimizer.signal_every=1")
    built = tiny.setup(tmp_path, checkpoint, *turns)
    updater = Updater(built)
    updater(tiny.train_set(built, 1))
    found = updater(tiny.train_set(built, 2))
    assert "image/grad_cosine" in found
    assert "text/grad_cosine" not in found


def named(built, expert):
    owned = built.policy.parameters()[expert]
    return [(name, p.detach().clone()) for name, p in owned.items() if p.requires_grad]


# --- dynamic sampling -------------------------------------------------------------------------

SOLVED = "rewards=[{use='solved', among=2}]"


def test_equal_prompts_are_dropped_and_counted(checkpoint, tmp_path):
    run = tiny.run(tmp_path, checkpoint, SOLVED, "group.equal='drop'", "prompts=6", "steps=1")
    (found,) = lines(run)
    assert found["groups/requested"] == 6
    assert 0 < found["groups/kept"] < 6
    assert found["text/equal_groups"] == pytest.approx(1 - found["groups/kept"] / 6)
    assert found["images"] == 18  # all that were sampled


def test_dropping_is_training_on_the_others_alone(checkpoint, tmp_path):
    built = tiny.setup(tmp_path, checkpoint, SOLVED, "group.equal='drop'", "prompts=6")
    whole = tiny.setup(tmp_path, checkpoint, SOLVED, "prompts=6")
    less, more = tiny.train_set(built), tiny.train_set(whole)
    rows = more.text_advantages.nonzero()[:, 0]
    rows = torch.isin(more.owner, more.owner[rows]).nonzero()[:, 0]
    assert len(less.owner) == len(rows)
    assert less.prompts == tuple(more.prompts[row] for row in rows.tolist())
    assert torch.equal(less.tokens, more.tokens[rows])
    assert torch.equal(less.points.x_next, more.points.x_next[rows])
    assert torch.equal(less.text_advantages, more.text_advantages[rows])


def test_points_that_are_drawn_are_a_prompt_s_own(checkpoint, tmp_path):
    """They do not depend on which other prompts were dropped."""
    fresh = (SOLVED, "prompts=6", "image.objective={use='awm'}", "group.fan_out=[2, 2]")
    whole = tiny.train_set(tiny.setup(tmp_path, checkpoint, *fresh))
    less = tiny.train_set(tiny.setup(tmp_path, checkpoint, *fresh, "group.equal='drop'"))
    rows = [row for row, prompt in enumerate(whole.prompts) if prompt in less.prompts]
    assert 0 < len(rows) < len(whole.prompts)
    assert torch.equal(less.points.t, whole.points.t[rows])
    assert torch.equal(less.points.x_t, whole.points.x_t[rows])
    late = whole.points.t[:, [2, 5]]  # above the lowest time, at which several may stand
    assert late.unique().numel() == late.numel()


def test_prompts_of_equal_rewards_are_told_whatever_the_number_of_rewards():
    """Totals that are summed in another order from row to row would differ by their rounding."""
    rewards = torch.rand(40, 7, generator=torch.Generator().manual_seed(7))
    for row in rewards:
        total = Scores(("",) * 7, row.expand(13, 7).contiguous(), rewards[0], {}).total
        assert total.unique().numel() == 1


def test_dropped_places_are_filled_with_further_prompts(checkpoint, tmp_path):
    full = ("group={fan_out=[3, 1], equal='resample', resample_rounds=20}", "prompts=6", "steps=2")
    run = tiny.run(tmp_path, checkpoint, SOLVED, *full)
    for found in lines(run):
        assert found["groups/kept"] == 6
        assert found["groups/requested"] > 6
        assert found["groups/requested"] % 6 == 0
        assert found["images"] == 3 * found["groups/requested"]


def test_resampling_ends_at_its_cap(checkpoint, tmp_path):
    none = ("group={fan_out=[3, 1], equal='resample', resample_rounds=2}", "steps=1")
    run = tiny.run(tmp_path, checkpoint, "rewards=[{use='solved', among=0}]", *none)
    (found,) = lines(run)
    assert (found["groups/requested"], found["groups/kept"]) == (12, 0)
    assert found["text/grad_norm"] == found["image/grad_norm"] == 0


def test_prompts_that_are_left_are_shared_out_evenly(checkpoint, tmp_path):
    """5 prompts in 2 updates: 3 and 2."""
    built = tiny.setup(tmp_path, checkpoint, "prompts=5", "updates.data='repeat'")
    data = tiny.train_set(built)
    object.__setattr__(built.recipe.updates, "data", "disjoint")
    shares = Updater(built)._shares(data)
    assert [len(set(data.owner[rows].tolist())) for rows in shares] == [3, 2]


def test_signal_is_measured_when_fewer_prompts_left_fewer_updates(checkpoint, tmp_path):
    every = ("optimizer.signal_every=1", "updates.count=2")
    one = tiny.train_set(tiny.setup(tmp_path, checkpoint, "prompts=1", "updates.count=1"))
    built = tiny.setup(tmp_path, checkpoint, *every)
    updater = Updater(built)
    updater(one)
    assert "text/grad_cosine" in updater(tiny.train_set(built, 2))


# --- budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("clock", ["cpu", "wall"])
def test_a_run_ends_when_its_budget_is_spent(checkpoint, tmp_path, clock):
    run = tiny.run(tmp_path, checkpoint, "steps=500", f"budget='{clock}:1s'", "evaluation.every=0")
    summary = json.loads((run / "summary.json").read_text())
    taken = len(lines(run))
    assert 1 <= taken < 500
    assert summary["steps"] == taken
    assert summary[f"train_{clock}_s"] >= 1
    timing = lines(run, "timing.jsonl")
    assert sum(line[f"{clock}_s"] for line in timing[:-1]) < 1
    first, last = lines(run, "evaluation.jsonl")
    assert (first["step"], last["step"]) == (0, taken)
    assert first["prompts"] == last["prompts"] == 4  # those of the start and the end


# --- scores with a gradient -------------------------------------------------------------------


def test_graded_scores_are_the_rewards_with_their_gradient(checkpoint, tmp_path):
    rewards = "rewards=[{use='brightness', weight=2.0}, {use='random', weight=0}]"
    built = tiny.setup(tmp_path, checkpoint, rewards)
    latents = 0.1 * torch.randn(2, 3, *built.image_policy.latent_shape(tiny.SIZE))
    latents.requires_grad_()
    prompts = tiny.prompts(2)
    score = graded(built, (prompts, None), latents)
    images = built.image_policy.decode(latents.flatten(0, 1), tiny.SIZE)
    expected = 2 * images.flatten(1).mean(1).view(2, 3)
    torch.testing.assert_close(score, expected)
    (gradient,) = torch.autograd.grad(score[0, 1], latents)
    assert gradient[0, 1].any()
    gradient[0, 1] = 0
    assert not gradient.any()


def test_a_reward_that_claims_a_gradient_has_one(checkpoint, tmp_path):
    built = tiny.setup(tmp_path, checkpoint, "rewards=[{use='random'}]")
    latents = torch.zeros(1, 1, *built.image_policy.latent_shape(tiny.SIZE)).requires_grad_()
    with pytest.raises(PluginError, match="scores without gradient"):
        graded(built, (tiny.prompts(1), None), latents)
