"""Rollouts: the forest, its draws, what is stored, and what is shared."""

from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from tiny import SIZE, image_of, prompts, same_tokens, text_of

from unigrpo_core.engine.rollout import Plan, sample
from unigrpo_core.engine.scoring import episodes
from unigrpo_core.keys import Key, normals

KEY = Key((0, "test"))
SHAPE = (SIZE[0] // 4, SIZE[1] // 4, 48)


def rolled(setup, fan_out=(2, 3), trained=(1, 2), count=2, key=KEY, denoising=None):
    plan = Plan(setup.recipe.episode, fan_out, denoising or setup.training, trained)
    return sample(setup, prompts(count), plan, key)


def equal(a, b):
    """Bit for bit, field by field."""
    for one, other in zip(a.segments, b.segments, strict=True):
        for field in fields(one):
            x, y = getattr(one, field.name), getattr(other, field.name)
            if not (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y):
                return False
    return True


def by_hand(setup, rollout, row, trained, noise_path):
    """One image recomputed alone, by the formulas and the documented keys: its latents before
    each step, and the result."""
    policy, plan = setup.policy, setup.training
    thought = int(rollout.ancestors(1, 0)[row])
    prompt = rollout.prompts[int(rollout.ancestors(1, -1)[row])]
    width = len(rollout.parents[0]) // len(rollout.prompts)
    images = len(rollout.parents[1]) // len(rollout.parents[0])
    paths = {
        "prompt": KEY.child(prompt.id),
        "thought": KEY.child(prompt.id, thought % width),
        "episode": KEY.child(prompt.id, thought % width, row % images),
    }
    from unigrpo_core.records import Sampling

    written, history = policy.write(
        policy.open([prompt]),
        Sampling(setup.recipe.text.max_tokens, setup.recipe.text.temperature),
        [paths["thought"]],
    )
    assert written.texts[0] == text_of(rollout).texts[thought]
    x = normals([paths[noise_path].child("noise")], SHAPE, "cpu")
    seen = [x]
    for step, (now, then) in enumerate(pairwise(plan.times)):
        level = plan.noise_level if step in trained else 0.0
        times = [torch.full((1, 1), value) for value in (now, then, level)]
        v = policy.velocity(history, x, times[0][:, 0])
        transition = plan.scheduler.transition(v[:, None], x[:, None], *times)
        x = transition.mean[:, 0]
        if step in trained:
            noise = normals([paths["episode"].child("step", step)], SHAPE, "cpu")
            x = x + transition.std[:, 0] * noise
        seen.append(x)
    return torch.cat(seen)


# --- the forest -------------------------------------------------------------------------------


def test_parents_and_ancestors(setup):
    rollout = rolled(setup(), fan_out=(2, 3), count=3)
    assert [len(parents) for parents in rollout.parents] == [6, 18]
    assert rollout.parents[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert rollout.parents[1].tolist() == [i // 3 for i in range(18)]
    assert rollout.ancestors(1, 1).tolist() == list(range(18))
    assert rollout.ancestors(1, 0).tolist() == rollout.parents[1].tolist()
    assert rollout.ancestors(1, -1).tolist() == [i // 6 for i in range(18)]
    assert rollout.ancestors(0, -1).tolist() == rollout.parents[0].tolist()


def test_episodes_see_their_own_branch(setup):
    rollout = rolled(setup())
    batch = episodes(rollout, "label")
    assert len(batch) == 12
    assert [p.id for p in batch.prompts] == ["p0"] * 6 + ["p1"] * 6
    assert batch.thoughts == tuple(text_of(rollout).texts[i // 3] for i in range(12))
    assert torch.equal(batch.images, image_of(rollout).images)
    assert len(set(batch.keys)) == 12


def test_shapes_and_ranges(setup):
    image = image_of(rolled(setup(), trained=(1, 2)))
    assert image.x_t.shape == image.x_next.shape == image.old_mean.shape == (12, 2, *SHAPE)
    assert image.t.shape == image.t_next.shape == image.noise_level.shape == (12, 2)
    assert image.images.shape == (12, 3, *SIZE)
    assert image.images.min() >= 0
    assert image.images.max() <= 1
    tensors = [getattr(image, field.name) for field in fields(image)]
    assert all(x.dtype == torch.float32 and not x.requires_grad for x in tensors)
    assert len({x.data_ptr() for x in tensors}) == len(tensors)


@pytest.mark.parametrize(("episode", "fan_out", "rows"), [("draw", (3,), 6), ("think", (4,), 8)])
def test_episodes_of_one_segment(setup, episode, fan_out, rows):
    built = setup(
        f"episode=['{episode}']",
        f"group.fan_out=[{fan_out[0]}]",
        f"train=['{'image' if episode == 'draw' else 'text'}']",
    )
    rollout = rolled(built, fan_out=fan_out)
    batch = episodes(rollout, "label")
    assert len(batch) == rows
    assert (batch.images is None) == (episode == "think")
    assert (batch.thoughts is None) == (episode == "draw")
    assert rollout.ancestors(0, -1).tolist() == [0] * fan_out[0] + [1] * fan_out[0]


# --- draws ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["episode", "thought", "prompt"])
@pytest.mark.parametrize("guidance", ["none", "cfg"])
def test_batching_changes_no_token_and_latents_only_by_rounding(setup, scope, guidance):
    """Rows sampled 1, 3, 8 or 256 at once."""
    built = setup(f"image.noise_scope='{scope}'", f"image.guidance={{use='{guidance}'}}")

    def with_rows(rows):
        compute = built.recipe.compute.model_copy(update={"rollout_rows": rows})
        recipe = built.recipe.model_copy(update={"compute": compute})
        return rolled(replace(built, recipe=recipe), count=3)

    whole = with_rows(256)
    for rows in (1, 3, 8):
        other = with_rows(rows)
        assert same_tokens(text_of(whole), text_of(other))
        mask = text_of(whole).mask
        torch.testing.assert_close(
            text_of(other).logps[mask], text_of(whole).logps[mask], atol=1e-5, rtol=0
        )
        for name in ("x_t", "x_next", "old_mean", "latents", "images"):
            got, expected = getattr(image_of(other), name), getattr(image_of(whole), name)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        for name in ("t", "t_next", "noise_level"):
            assert torch.equal(getattr(image_of(other), name), getattr(image_of(whole), name))
        for one, other_parents in zip(whole.parents, other.parents, strict=True):
            assert torch.equal(one, other_parents)


def test_a_prompt_draws_the_same_in_any_company(setup):
    built = setup()
    both = rolled(built, count=2)
    alone = sample(
        built, prompts(2)[1:], Plan(built.recipe.episode, (2, 3), built.training, (1, 2)), KEY
    )
    assert text_of(both).texts[2:] == text_of(alone).texts
    torch.testing.assert_close(
        image_of(both).latents[6:], image_of(alone).latents, atol=1e-5, rtol=1e-5
    )


def test_more_continuations_keep_the_first_ones(setup):
    built = setup()
    few, many = rolled(built, fan_out=(2, 1)), rolled(built, fan_out=(3, 2))
    assert [text_of(many).texts[i] for i in (0, 1, 3, 4)] == list(text_of(few).texts)
    torch.testing.assert_close(
        image_of(many).latents[[0, 2, 6, 8]], image_of(few).latents, atol=1e-5, rtol=1e-5
    )


def test_the_same_key_gives_the_same_bits_and_another_key_other_draws(setup):
    built = setup()
    first = rolled(built)
    assert equal(first, rolled(built))
    other = rolled(built, key=Key((1, "test")))
    assert not torch.allclose(image_of(first).x_t, image_of(other).x_t)
    assert text_of(first).texts != text_of(other).texts


# --- trajectories -----------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["episode", "thought", "prompt"])
@pytest.mark.parametrize("trained", [(0,), (1, 2), (3,), ()])
def test_every_image_is_what_it_would_be_alone(setup, scope, trained):
    """Sharing computes nothing else than the trajectory by the formulas, with the keyed noise."""
    built = setup(f"image.noise_scope='{scope}'")
    rollout = rolled(built, trained=trained)
    image = image_of(rollout)
    times = built.training.times
    for row in (0, 4, 11):
        seen = by_hand(built, rollout, row, trained, scope)
        torch.testing.assert_close(image.latents[row], seen[-1], atol=1e-5, rtol=1e-5)
        for place, step in enumerate(trained):
            torch.testing.assert_close(image.x_t[row, place], seen[step], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                image.x_next[row, place], seen[step + 1], atol=1e-5, rtol=1e-5
            )
    for place, step in enumerate(trained):
        assert image.t[:, place].eq(torch.tensor(times[step])).all()
        assert image.t_next[:, place].eq(torch.tensor(times[step + 1])).all()
        assert image.noise_level[:, place].eq(torch.tensor(built.training.noise_level)).all()


def test_stored_steps_are_the_transition_with_the_keyed_noise(setup):
    """x_next = mean + std noise, the mean stored, and the window's steps join up."""
    built = setup()
    rollout = rolled(built, trained=(1, 2))
    image = image_of(rollout)
    # std does not depend on the velocity.
    transition = built.training.scheduler.transition(
        torch.zeros_like(image.x_t), image.x_t, image.t, image.t_next, image.noise_level
    )
    for row in range(12):
        prompt = rollout.prompts[row // 6].id
        key = KEY.child(prompt, row // 3 % 2, row % 3)
        for place, step in enumerate((1, 2)):
            noise = normals([key.child("step", step)], SHAPE, "cpu")[0]
            expected = image.old_mean[row, place] + transition.std[row, place] * noise
            torch.testing.assert_close(image.x_next[row, place], expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(image.x_next[:, 0], image.x_t[:, 1])


def test_noise_shared_within_a_thought(setup):
    """Siblings are one up to the first stochastic step, and part in its noise."""
    built = setup("image.noise_scope='thought'")
    image = image_of(rolled(built, trained=(1, 2)))
    families = image.x_t[:, 0].view(4, 3, *SHAPE)
    assert torch.equal(families, families[:, :1].expand_as(families))
    means = image.old_mean[:, 0].view(4, 3, *SHAPE)
    assert torch.equal(means, means[:, :1].expand_as(means))
    assert not torch.allclose(families[0, 0], families[1, 0], atol=0.1)
    after = image.x_next[:, 0].view(4, 3, *SHAPE)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (after[:, i] - after[:, j]).abs().amax((1, 2, 3)).min() > 0.1


def test_noise_shared_within_a_prompt_starts_all_its_thoughts_alike(setup):
    built = setup("image.noise_scope='prompt'")
    image = image_of(rolled(built, trained=(0,)))
    start = image.x_t[:, 0].view(2, 6, *SHAPE)
    assert torch.equal(start, start[:, :1].expand_as(start))
    assert not torch.allclose(start[0], start[1], atol=0.1)
    assert not torch.allclose(image.old_mean[0], image.old_mean[3], atol=1e-3)


def test_noise_of_its_own_for_every_episode(setup):
    start = image_of(rolled(setup(), trained=(0,))).x_t[:, 0].flatten(1)
    distance = torch.cdist(start, start) + 1e3 * torch.eye(12)
    assert distance.min() > 1


def test_without_a_stochastic_step_siblings_with_shared_noise_end_alike(setup):
    built = setup("image.noise_scope='thought'")
    image = image_of(rolled(built, trained=()))
    ends = image.latents.view(4, 3, *SHAPE)
    assert torch.equal(ends, ends[:, :1].expand_as(ends))
    assert image.x_t.shape == (12, 0, *SHAPE)
    assert image.t.shape == (12, 0)


def test_sharing_saves_the_network_the_common_prefix(setup):
    """Rows computed: one per thought up to and with the first stochastic step."""
    counts = {}
    for scope in ("episode", "thought"):
        built = setup(f"image.noise_scope='{scope}'")
        rows = []
        built.policy.network.llm2vae.register_forward_hook(
            lambda module, arguments, out, rows=rows: rows.append(len(out))
        )
        rolled(built, trained=(1, 2))
        counts[scope] = sum(rows)
    assert counts == {"episode": 4 * 12, "thought": 2 * 4 + 2 * 12}


# --- guidance ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guidance", "calls"),
    [
        ("{use='none'}", 4),
        ("{use='cfg', scale=3.0}", 8),
        ("{use='cfg', scale=1.0}", 4),
        ("{use='cfg', scale=3.0, interval=[0.5, 0.9]}", None),
    ],
)
def test_guidance_pays_for_its_calls_only(setup, guidance, calls):
    built = setup(f"image.guidance={guidance}")
    made = []
    built.policy.network.llm2vae.register_forward_hook(lambda *_: made.append(1))
    rolled(built, trained=())
    if calls is None:
        inside = [t for t in built.training.times[:-1] if 0.5 < t <= 0.9]
        assert 0 < len(inside) < 4
        calls = 4 + len(inside)
    assert len(made) == calls


def test_guided_velocities_are_what_is_integrated(setup):
    plain, guided = setup(), setup("image.guidance={use='cfg', scale=3.0}")
    one, other = rolled(plain, trained=(0,)), rolled(guided, trained=(0,))
    image, text = image_of(other), text_of(other)
    assert same_tokens(text_of(one), text)
    assert torch.equal(image_of(one).x_t[:, 0], image.x_t[:, 0])
    # The mean is linear in the velocity: mean(v) = m0 + c v, so guidance shows in the means.
    scheduler = guided.training.scheduler
    arguments = (image.x_t, image.t, image.t_next, image.noise_level)
    policy = guided.policy
    empty = policy.branches(policy.open(prompts(1) * 12), ("text",))["text"]
    v_u = policy.velocity(empty, image.x_t[:, 0], image.t[:, 0])[:, None]
    mean_u = scheduler.transition(v_u, *arguments).mean
    mean_c = image_of(one).old_mean
    torch.testing.assert_close(image.old_mean, mean_u + 3 * (mean_c - mean_u), atol=1e-5, rtol=1e-4)


def test_the_clock_knows_the_phases(setup):
    from unigrpo_core.engine.clock import Clock

    built = setup()
    clock = Clock(built.device)
    sample(built, prompts(2), Plan(built.recipe.episode, (2, 1), built.training, ()), KEY, clock)
    assert set(clock.phases) == {"text", "image"}
    assert all(seconds > 0 for seconds in clock.phases.values())
