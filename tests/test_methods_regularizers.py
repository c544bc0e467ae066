"""Regularizers against independent formulas; exactly 0 at the anchor; gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from unigrpo_methods import hooks
from unigrpo_methods.regularizers import entropy, latent_kl, text_kl, velocity_mse
from unigrpo_methods.schedulers import flow_sde

from unigrpo_core.plugin import Provider
from unigrpo_core.records import FlowStep, TokenStep

Penalty = Callable[[Tensor], Tensor]

SDE = flow_sde.build(flow_sde.FlowSDEOptions())


def flow_step(v: Tensor, v_anchor: Tensor) -> FlowStep:
    """Steps from t = .8 and .5 by .2, noise level .8, for velocities [B, 2, *]."""
    x_t = torch.linspace(-1, 1, v.numel(), dtype=v.dtype).reshape(v.shape)
    t = torch.tensor([[0.8, 0.5]], dtype=v.dtype).expand(len(v), 2)
    points = (x_t, t, t - 0.2, torch.full_like(t, 0.8))
    return FlowStep(
        v=v,
        v_anchor=v_anchor,
        x_t=x_t,
        t=t,
        t_next=t - 0.2,
        transition=SDE.transition(v, *points),
        transition_anchor=SDE.transition(v_anchor, *points),
    )


def velocities(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    v, gap = torch.randn(2, 3, 2, 4, 5, generator=generator, dtype=dtype)
    return v, v + 0.1 * gap


def test_velocity_mse_is_a_mean_of_squares() -> None:
    v = torch.tensor([[[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]])
    anchor = torch.tensor([[[1.0, 4.0, 2.0], [3.0, 0.0, 0.0]]])
    penalty = velocity_mse.build(velocity_mse.VelocityMSEOptions())
    torch.testing.assert_close(penalty(flow_step(v, anchor)), torch.tensor([[5 / 3, 3.0]]))


def test_latent_kl_is_that_of_the_normal_distributions_dt_included() -> None:
    step = flow_step(*velocities())
    # sigma^2 dt by hand: .64 * .8 / .2 * .2 and .64 * .5 / .5 * .2
    std = torch.tensor([0.512, 0.128], dtype=torch.float64).sqrt().reshape(1, 2, 1, 1)
    new, anchor = (
        torch.distributions.Normal(side.mean, std.expand_as(side.mean))
        for side in (step.transition, step.transition_anchor)
    )
    expected = torch.distributions.kl_divergence(new, anchor).mean((2, 3))
    ours = latent_kl.build(latent_kl.LatentKLOptions())(step)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


def test_latent_kl_is_velocity_mse_times_the_documented_factor() -> None:
    step = flow_step(*velocities())
    t = torch.tensor([0.8, 0.5]).double()
    sigma = 0.8 * (t / (1 - t)).sqrt()
    factor = 0.2 / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2
    mse = velocity_mse.build(velocity_mse.VelocityMSEOptions())(step)
    kl = latent_kl.build(latent_kl.LatentKLOptions())(step)
    torch.testing.assert_close(kl, mse * factor, atol=0, rtol=1e-6)


def test_latent_kl_without_dt_is_that_of_flow_grpos_code() -> None:
    step = flow_step(*velocities())
    # sigma^2 by hand, without the .2 of dt: .64 * .8 / .2 and .64 * .5 / .5
    sigma_square = torch.tensor([2.56, 0.64]).double()
    gap = step.transition.mean - step.transition_anchor.mean
    expected = gap.square().mean((2, 3)) / (2 * sigma_square)
    ours = latent_kl.build(latent_kl.LatentKLOptions(form="without_dt"))(step)
    torch.testing.assert_close(ours, expected, atol=0, rtol=1e-6)
    exact = latent_kl.build(latent_kl.LatentKLOptions())(step)
    torch.testing.assert_close(ours, 0.2 * exact)


def token_step(logps: Tensor, anchor: Tensor) -> TokenStep:
    mask = torch.ones_like(logps, dtype=torch.bool)
    mask[:, -1] = False
    return TokenStep(logps=logps, logps_anchor=anchor, mask=mask)


def test_text_kl_by_hand() -> None:
    penalty = text_kl.build(text_kl.TextKLOptions())
    logps = torch.tensor([[-1.0, -1.0, -1.0, float("-inf")]], dtype=torch.float64)
    anchor = torch.tensor([[-1.0, -0.5, -3.0, -1.0]], dtype=torch.float64)
    expected = [0.0, math.exp(0.5) - 1.5, math.exp(-2.0) + 1.0, 0.0]
    assert penalty(token_step(logps, anchor)).tolist() == [pytest.approx(expected, abs=1e-12)]


def test_text_kl_keeps_digits_near_the_anchor_and_is_never_negative() -> None:
    penalty = text_kl.build(text_kl.TextKLOptions())
    logps = torch.tensor([[-0.01, 0.0]])
    close = penalty(token_step(logps, logps + 1e-3))[0, 0].item()
    gap = (logps + 1e-3 - logps).double()[0, 0].item()
    assert close == pytest.approx(gap**2 / 2 + gap**3 / 6, rel=1e-3)
    gaps = torch.linspace(-1e-3, 1e-3, 20_001)[None]
    assert (penalty(token_step(torch.zeros_like(gaps), gaps)) >= 0).all()


DISTANCES = [one for one in hooks.unigrpo_regularizers() if one.kind == "distance"]


def penalised(provider: Provider, gap: float, dtype: torch.dtype) -> tuple[Penalty, Tensor]:
    """The penalty as a function of velocities or log-probs at a distance of about ``gap`` from the
    anchor's, and these."""
    penalty = provider.build(provider.options())
    generator = torch.Generator().manual_seed(1)
    if "logps_anchor" in provider.needs:
        at, to = torch.randn(2, 4, 50, generator=generator, dtype=dtype)
        anchor = -1 - at.abs()
        return lambda logps: penalty(token_step(logps, anchor)), anchor + gap * to
    at, to = torch.randn(2, 3, 2, 4, 5, generator=generator, dtype=dtype)
    return lambda v: penalty(flow_step(v, at)), at + gap * to


@pytest.mark.parametrize("provider", DISTANCES, ids=lambda provider: provider.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_distance_is_exactly_0_at_the_anchor_and_never_negative(
    provider: Provider, dtype: torch.dtype
) -> None:
    penalty, anchor = penalised(provider, 0.0, dtype)
    values = penalty(anchor)
    assert values.dtype == dtype
    assert not values.any()
    for gap in (1e-8, 1e-6, 1e-4, 1e-2, 1.0, 5.0):
        penalty, away = penalised(provider, gap, dtype)
        assert (penalty(away) >= 0).all()
        assert gap < 1e-4 or (penalty(away) > 0).float().mean() > 0.9


@pytest.mark.parametrize("provider", DISTANCES, ids=lambda provider: provider.name)
def test_gradients_of_every_distance(provider: Provider) -> None:
    for gap in (0.0, 0.3):
        penalty, free = penalised(provider, gap, torch.float64)
        assert torch.autograd.gradcheck(penalty, (free.requires_grad_(),))


def test_text_kl_estimates_the_divergence() -> None:
    policy, anchor = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.2, 0.3])
    step = TokenStep(policy.log()[None], anchor.log()[None], torch.ones(1, 3, dtype=torch.bool))
    expected = 0.7 * math.log(0.7 / 0.5) + 0.1 * math.log(0.1 / 0.3)
    estimate = (policy * text_kl.build(text_kl.TextKLOptions())(step)).sum().item()
    assert estimate == pytest.approx(expected, abs=1e-6)


def of_vocabulary(logits: Tensor, sampled: Tensor) -> Tensor:
    """The bonus of each word of a vocabulary, [words], weighted as if it were drawn by ``sampled``
    and summed: the expectation of one token's bonus."""
    step = TokenStep(logits.log_softmax(0)[None], torch.zeros(1, 4), torch.ones(1, 4).bool())
    return (sampled * entropy.build(entropy.EntropyOptions())(step)[0]).sum()


def test_entropy_estimates_minus_the_entropy_and_its_gradient() -> None:
    logits = torch.tensor([0.3, -1.2, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    chances = logits.detach().softmax(0)
    exact = torch.distributions.Categorical(logits=logits).entropy()
    estimate = of_vocabulary(logits, chances)
    assert estimate.item() == pytest.approx(-exact.item(), abs=1e-12)
    (expected,) = torch.autograd.grad(exact, logits)
    (gradient,) = torch.autograd.grad(estimate, logits)
    torch.testing.assert_close(gradient, -expected)
    # A step down the penalty flattens the distribution.
    flatter = logits.detach() - 0.1 * gradient
    assert torch.distributions.Categorical(logits=flatter).entropy() > exact


def test_entropy_by_hand() -> None:
    logps = torch.tensor([[-0.5, -2.0, 0.0, float("nan")]], requires_grad=True)
    values = entropy.build(entropy.EntropyOptions())(token_step(logps, torch.zeros(1, 4)))
    assert values.tolist() == [[-0.5, -2.0, 0.0, 0.0]]
    (gradient,) = torch.autograd.grad(values.sum(), logps)
    assert gradient.tolist() == [[-0.5, -2.0, 0.0, 0.0]]


def test_entropy_is_biased_by_tokens_of_another_policy() -> None:
    """As its file says: tokens of a uniform policy give another gradient than the policy's own."""
    logits = torch.tensor([0.3, -1.2, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    own, other = (
        torch.autograd.grad(of_vocabulary(logits, chances), logits)[0]
        for chances in (logits.detach().softmax(0), torch.full((4,), 0.25))
    )
    assert (own - other).abs().max() > 0.1
