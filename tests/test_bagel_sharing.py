"""What is equal is computed once, and counts as often as it stands there."""

import pytest
import torch
import torch.nn.functional as F
from tiny import prompts
from unigrpo_models.bagel.replay import equal_images, index_of
from unigrpo_models.norm import RMSNorm

from unigrpo_core.keys import Key, normals
from unigrpo_core.records import ReplayBatch, Sampling

BRIEF = Sampling(max_tokens=5)


@pytest.fixture
def policy(setup):
    return setup().policy


@pytest.fixture
def batch(policy):
    """Five contexts of two prompts: 0, 2 and 4 say the same, and the first points of 0 and 2 have
    the same latents at the same time."""
    starts = prompts(2)
    first = policy.open([starts[row] for row in (0, 0, 1)])
    segment, _ = policy.write(first, BRIEF, [Key((row,)) for row in range(3)])
    rows = [0, 1, 0, 2, 0]
    x_t = normals([Key(("x", row)) for row in range(5)], (2, 2, 3, 48), "cpu")
    x_t[2, 0] = x_t[0, 0]
    t = torch.tensor([[0.9, 0.3]]).repeat(5, 1)
    t[4, 1] = 0.2
    return ReplayBatch(
        prompts=tuple(starts[0 if row < 2 else 1] for row in rows),
        tokens=segment.tokens[rows],
        mask=segment.mask[rows],
        temperature=1.0,
        want_logps=True,
        x_t=x_t,
        t=t,
        branches=("text",),
        context_gradient=True,
    )


def rows_of(batch, rows):
    return ReplayBatch(
        prompts=tuple(batch.prompts[row] for row in rows),
        tokens=batch.tokens[rows],
        mask=batch.mask[rows],
        temperature=1.0,
        want_logps=True,
        x_t=batch.x_t[rows],
        t=batch.t[rows],
        branches=batch.branches,
        context_gradient=True,
    )


def backward(policy, batch, seeds):
    """Gradients of a random linear function of each row, by name, and the values."""
    replay, total = policy.root(batch), 0.0
    for row, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for value in (replay.logps, replay.velocities, replay.branches["text"]):
            total = total + (value[row] * torch.randn(value.shape[1:], generator=generator)).sum()
    named = dict(policy.root.named_parameters())
    wanted = {name: p for name, p in named.items() if p.requires_grad}
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    blank = [
        torch.zeros_like(p) if g is None else g for p, g in zip(wanted.values(), found, strict=True)
    ]
    return dict(zip(wanted, blank, strict=True)), replay


def test_equal_rows_have_the_values_and_gradients_that_they_have_alone(policy, batch):
    together, replay = backward(policy, batch, range(5))
    alone = {name: torch.zeros_like(g) for name, g in together.items()}
    for row in range(5):
        single, own = backward(policy, rows_of(batch, [row]), [row])
        for name, gradient in single.items():
            alone[name] += gradient
        torch.testing.assert_close(replay.velocities[row], own.velocities[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(replay.logps[row], own.logps[0], atol=1e-5, rtol=0)
    for name, gradient in together.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradient, alone[name], atol=1e-5 * scale + 1e-6, rtol=1e-4)
    assert any(g.abs().max() > 1 for g in together.values())


def test_equal_texts_and_images_are_computed_once(policy, batch, monkeypatch):
    network, texts, images = policy.network, [], []
    text, velocity = network.text, network.velocity

    def counted_text(ids, *more, **named):
        texts.append(len(ids))
        return text(ids, *more, **named)

    def counted_velocity(x_t, *more, **named):
        images.append(len(x_t))
        return velocity(x_t, *more, **named)

    monkeypatch.setattr(network, "text", counted_text)
    monkeypatch.setattr(network, "velocity", counted_velocity)
    policy.root(batch)
    assert texts == [2, 3]  # prompts; thoughts, of five contexts
    assert images == [9, 9]  # of ten, over the texts and over nothing
    images.clear()
    _, history = policy.write(
        policy.open([batch.prompts[0]] * 3), BRIEF, [Key((0,)), Key((1,)), Key((0,))]
    )
    x = batch.x_t[:1, 0].repeat(3, 1, 1, 1)
    v = policy.velocity(history, x, batch.t[:3, 0])
    assert images == [2]
    assert torch.equal(v[0], v[2])
    assert not torch.equal(v[0], v[1])
    policy.velocity(history, batch.x_t[[0, 1, 3], 0], batch.t[:3, 0])
    assert images == [2, 3]


def test_what_counts_as_an_equal_image():
    x_t, t = torch.zeros(4, 1, 1, 2), torch.tensor([0.5, 0.5, 0.5, 0.25])
    x_t[1] += 1e-7
    assert equal_images([0, 0, 0, 0], x_t, t) == ([0, 1, 3], [0, 1, 0, 2])
    assert equal_images([0, 0, 1, 0], x_t, t) == ([0, 1, 2, 3], [0, 1, 2, 3])
    assert index_of("abca") == [0, 1, 2, 0]


def test_rms_norm_is_torchs_with_its_gradient():
    norm = RMSNorm(6, 1e-6).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(6) + 0.5)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (6,), norm.weight, 1e-6), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradcheck(
        lambda w: torch.func.functional_call(norm, {"weight": w}, x),
        (norm.weight.detach().clone().requires_grad_(),),
    )
    norm(x, frozen=True).sum().backward()
    assert norm.weight.grad is None
    assert x.grad is not None
