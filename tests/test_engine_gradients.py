"""Gradients of whole updates: however it is cut into micro-batches, and of whom.

The first half computes in float64 throughout, so that what differs is not rounding.
"""

from dataclasses import replace

import pytest
import torch
from tiny import is_image, train_set
from unigrpo_methods.objectives.grpo import GRPO

from unigrpo_core.engine.update import Updater

PENALTIES = (
    "image.regularizers=[{use='velocity_mse', weight=0.5}, {use='latent_kl', weight=0.5}]",
    "text.regularizers=[{use='text_kl', weight=0.5}]",
)


def with_budget(built, tokens):
    compute = built.recipe.compute.model_copy(update={"replay_tokens": tokens})
    return replace(built, recipe=built.recipe.model_copy(update={"compute": compute}))


def updated(built, data):
    """Metrics of the updates on a training set, and the gradients of each by weight."""
    updater, found = Updater(built), []
    step = updater.optimizer.step

    def recorded():
        named = built.policy.root.named_parameters()
        found.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        step()

    updater.optimizer.step = recorded
    return updater(data), found


def same(one, other, within):
    """Two results of :func:`updated`."""
    (metrics, gradients), (others, other_gradients) = one, other
    for name, value in metrics.items():
        if not name.startswith("gap/"):
            assert others[name] == pytest.approx(value, rel=within, abs=within), name
    for mine, theirs in zip(gradients, other_gradients, strict=True):
        assert mine.keys() == theirs.keys()
        for name, gradient in mine.items():
            assert gradient.dtype == torch.float64
            assert (gradient - theirs[name]).norm() <= within * gradient.norm(), name


# --- micro-batches ----------------------------------------------------------------------------


class TokenMean(GRPO):
    """GRPO with every token of the update alike."""

    def weights(self, mask):
        return mask.float()


OBJECTIVES = {"sequence mean": GRPO, "token mean": TokenMean}


def eight_contexts(setup, objective, size, *overrides):
    """A setup whose micro-batches have at most that many contexts, and eight contexts."""
    built = setup("prompts=4", "group.fan_out=[2, 2]", "text.max_tokens=24", *overrides)
    built = replace(built, text_objective=OBJECTIVES[objective](built.text_objective.options))
    data = train_set(built)
    budget = size * (max(data.sizes) + data.columns * data.image_tokens)
    sizes = [len(batch.rows) for batch in data.micro_batches(torch.arange(8), budget)]
    assert sizes == {1: [1] * 8, 3: [3, 3, 2], 8: [8]}[size]
    assert len(set(data.mask.sum(1).tolist())) > 2, "thoughts should differ in length"
    return with_budget(built, budget), data


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_of_1_3_and_8_give_one_loss_and_one_gradient(in_float64, setup, objective):
    repeat = "updates={count=2, data='repeat'}"
    one, three, eight = (
        updated(*eight_contexts(setup, objective, size, repeat, *PENALTIES)) for size in (1, 3, 8)
    )
    assert len(one[1]) == 2
    assert one[0]["image/ratio_deviation"] > 0
    assert one[0]["text/text_kl"] > 0
    same(one, three, 1e-11)
    same(one, eight, 1e-11)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_token_mean_is_over_the_tokens_of_the_whole_update(in_float64, setup, objective):
    """At the first update a token's value is minus its advantage."""
    built, data = eight_contexts(setup, objective, 3, "updates.count=1")
    lengths, advantages = data.mask.sum(1), data.text_advantages
    tokens = -float((advantages * lengths).sum() / lengths.sum())
    expected = {"token mean": tokens, "sequence mean": -float(advantages.mean())}
    assert abs(tokens) > 1e-3
    metrics, _ = updated(built, data)
    assert metrics["text/loss"] == pytest.approx(expected[objective], abs=1e-12)


# --- sampler and trainer ----------------------------------------------------------------------


def test_in_float64_the_cached_sampler_and_the_trainer_are_one(in_float64, setup):
    """So the gap of float32 is rounding and nothing else."""
    built = setup(
        "text.max_tokens=24",
        "image.noise_scope='prompt'",
        "image.guidance={use='cfg', scale=3.0}",
        "policy.system_prompt='red and blue'",
        "compute.rollout_rows=5",
    )
    metrics, _ = updated(built, train_set(built))
    names = ("text_mean", "text_max", "image_log_ratio", "image_radius_share", "trainer_twice")
    for name in names:
        assert metrics[f"gap/{name}"] < 1e-11, name


# --- subtrees ---------------------------------------------------------------------------------


def test_gradients_of_a_split_subtree_are_those_of_the_whole(in_float64, setup):
    """Split by points, down to one; the context is computed again for each part, and its thought
    is counted in one."""
    found = {}
    for wide, parts in ((8, 1), (3, 3), (1, 8)):
        built = setup("prompts=1", "group.fan_out=[2, 4]", "updates={count=2, data='repeat'}",
                      *PENALTIES)  # fmt: skip
        data = train_set(built)
        budget = max(data.sizes) + wide * data.image_tokens
        batches = list(data.micro_batches(torch.arange(2), budget))
        assert data.columns == 8
        assert [batch.counts_text for batch in batches] == [True] * 2 + [False] * 2 * (parts - 1)
        found[parts] = updated(with_budget(built, budget), data)
    for gradients in found[1][1]:
        assert sum(bool(g.norm() > 1e-6) for g in gradients.values()) > 0.9 * len(gradients)
    same(found[1], found[3], 1e-11)
    same(found[1], found[8], 1e-11)


# --- through the context ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "guided", [(), ("image.guidance={use='cfg', scale=3.0}", "policy.system_prompt='red and blue'")]
)
def test_without_context_gradient_images_give_every_text_weight_exactly_zero(setup, guided):
    """While the image expert's own gradient is what it is with it, and does not vanish."""
    found = {}
    for flag in ("true", "false"):
        built = setup(
            "updates.count=1", "text.weight=0.0", f"image.context_gradient={flag}", *guided
        )
        _, (found[flag],) = updated(built, train_set(built))
        names = [name for expert in built.policy.parameters().values() for name in expert]
    cut, free = found["false"], found["true"]
    texts = [name for name in names if not is_image(name)]
    images = [name for name in names if is_image(name)]
    assert texts
    assert images
    for name in texts:
        assert name not in cut or not cut[name].any(), name
    # With it all are reached, except what makes no keys and values of the last layer.
    last = ("layers.1", "model.norm", "lm_head")
    reached = [name for name in texts if name in free and free[name].any()]
    assert all(any(part in name for part in last) for name in set(texts) - set(reached))
    assert any("layers.1.self_attn.k_proj" in name for name in reached)
    for name in images:
        assert cut[name].norm() > 0, name
        assert (cut[name] - free[name]).norm() < 1e-4 * free[name].norm(), name


# --- the reference ----------------------------------------------------------------------------


def bits(policy):
    """Every weight of the root, as integers."""
    return {
        name: p.detach().clone().view(torch.int32) for name, p in policy.root.named_parameters()
    }


def test_the_reference_differs_after_an_update_and_swaps_in_and_out_bit_for_bit(setup):
    built = setup("updates.count=1", *PENALTIES)
    policy, data = built.policy, train_set(built)
    batch = next(data.micro_batches(torch.arange(len(data.owner)), 100_000))
    asked = data.replay_batch(built, batch, data.part(batch), want_logps=True)
    start, updater = bits(policy), Updater(built)
    with torch.no_grad():
        first = policy.root(asked)
    trained = {name for expert in policy.parameters().values() for name in expert}
    for _ in range(2):  # an optimizer that had hold of the kept weights would move them now
        updater(data)
        now = bits(policy)
        with policy.weights("reference"):
            kept = bits(policy)
            past = policy.root(asked)
        back = bits(policy)
        assert all(torch.equal(kept[name], start[name]) for name in start)
        assert all(torch.equal(back[name], now[name]) for name in now)
        assert {name for name in now if not torch.equal(now[name], kept[name])} == trained
        assert torch.equal(past.logps, first.logps)
        assert torch.equal(past.velocities, first.velocities)
        with torch.no_grad():
            assert not torch.equal(policy.root(asked).velocities, first.velocities)
        data = train_set(built, step=2)
