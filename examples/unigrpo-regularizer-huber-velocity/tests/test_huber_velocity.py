"""The penalty against hand-computed gaps."""

import pytest
import torch
from unigrpo_regularizer_huber_velocity import unigrpo_regularizers

from unigrpo_core.records import FlowStep
from unigrpo_core.testing import FlowRegularizerConformance


def penalty(gap, delta):
    """The penalty of one point whose latent elements are off by ``gap``, and its gradient."""
    [provider] = unigrpo_regularizers()
    built = provider.build(provider.options(delta=delta))
    anchor = torch.randn(1, 1, len(gap))
    v = (anchor + torch.tensor(gap)).requires_grad_()
    t = torch.ones(1, 1)
    value = built(FlowStep(v, anchor, v, t, t, None, None))
    [gradient] = torch.autograd.grad(value.sum(), v)
    return value, gradient.flatten()


def test_it_is_a_distance():
    value, gradient = penalty([0.0, 0.0, 0.0], 0.1)
    assert value.tolist() == [[0.0]]
    assert gradient.eq(0).all()


def test_below_and_above_delta():
    value, gradient = penalty([0.25, -0.25, 2.0, -3.0], 0.5)
    # .25^2 / 2 twice, then .5 (2 - .25) and .5 (3 - .25)
    assert value.item() == pytest.approx((0.0625 + 0.875 + 1.375) / 4, rel=1e-5)
    assert gradient.tolist() == pytest.approx([0.0625, -0.0625, 0.125, -0.125], rel=1e-4)
    assert value.shape == (1, 1)
    assert value.dtype == torch.float32


class TestConformance(FlowRegularizerConformance):
    """What every regularizer of images promises; found by its entry point, as a recipe would."""

    use = "huber_velocity"
