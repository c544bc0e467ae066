"""Guidance: the interval's edges, and velocities left alone."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from unigrpo_methods.guidance import cfg, none

V = torch.tensor([[[1.0, 2.0], [0.1, 0.7], [3.0, 5.0]]])
BRANCHES = {"text": torch.tensor([[[0.0, 4.0], [0.3, 0.9], [float("nan")] * 2]])}


def test_cfg_extrapolates_inside_its_interval_only() -> None:
    guidance = cfg.build(cfg.CFGOptions(scale=3.0, interval=(0.4, 0.9)))
    t = torch.tensor([[0.9, 0.5, 0.4]])
    assert guidance.branches == ("text",)
    assert guidance.active(t).tolist() == [[True, True, False]]
    assert guidance.active(torch.tensor([0.9001, 0.4001, 0.0, 1.0])).tolist() == [
        False,
        True,
        False,
        False,
    ]
    combined = guidance.combine(V, BRANCHES, t)
    torch.testing.assert_close(combined[0, 0], torch.tensor([3.0, -2.0]))
    torch.testing.assert_close(combined[0, 1], torch.tensor([-0.3, 0.3]))
    assert torch.equal(combined[0, 2], V[0, 2])


def test_the_default_interval_holds_every_time_a_step_starts_from() -> None:
    guidance = cfg.build(cfg.CFGOptions())
    assert guidance.active(torch.tensor([1.0, 0.01, 0.0])).tolist() == [True, True, False]


def test_scale_one_is_off_and_scale_zero_unconditional() -> None:
    t = torch.full((1, 3), 0.5)
    off = cfg.build(cfg.CFGOptions(scale=1))
    assert not off.active(t).any()
    assert off.combine(V, BRANCHES, t) is not None
    assert torch.equal(off.combine(V, BRANCHES, t), V)
    blind = cfg.build(cfg.CFGOptions(scale=0)).combine(V, BRANCHES, t)
    assert torch.equal(blind[:, :2], BRANCHES["text"][:, :2])


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_gradients_of_guidance(scale: float) -> None:
    """By both velocities, inside the interval and outside."""
    guidance = cfg.build(cfg.CFGOptions(scale=scale, interval=(0.4, 0.9)))
    t = torch.tensor([[0.95, 0.9, 0.5, 0.4]])
    generator = torch.Generator().manual_seed(0)
    v, free = torch.randn(2, 1, 4, 2, generator=generator, dtype=torch.float64).requires_grad_()

    def combined(v: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
        return guidance.combine(v, {"text": free}, t)

    assert torch.autograd.gradcheck(combined, (v, free))
    by_v, by_free = torch.autograd.grad(combined(v, free).sum(), (v, free))
    inside = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)[None, :, None].expand_as(v)
    assert torch.equal(by_v, 1 + (scale - 1) * inside)
    assert torch.equal(by_free, (1 - scale) * inside)


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
def test_rescaling_shrinks_each_image_or_token_and_never_enlarges(renorm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    v, text, image = torch.randn(3, 2, 3, 4, 5, 8, generator=generator)
    text[:, 1] = 2 * v[:, 1]  # the guided velocity is the shorter one
    given = {"text": text, "image": image}
    t = torch.full((2, 3), 0.5)

    def combined(**options: object) -> torch.Tensor:
        chosen = cfg.CFGOptions.model_validate({"scale": 1.3, **options})
        return cfg.build(chosen).combine(v, given, t)

    axes = (2, 3, 4) if renorm == "global" else (4,)
    free, shrunk = combined(), combined(renorm=renorm)
    norm, longest, found = (torch.linalg.vector_norm(x, dim=axes) for x in (v, free, shrunk))
    longer = (longest > norm).flatten()
    assert longer.any()
    assert not longer.all()
    torch.testing.assert_close(found, torch.minimum(longest, norm), atol=1e-5, rtol=1e-5)
    assert torch.equal(combined(renorm=renorm, renorm_min=1.0), free)
    both = combined(renorm=renorm, image_scale=2.0)
    if renorm == "text_channel":
        torch.testing.assert_close(both, image + 2 * (shrunk - image))
    else:
        assert (torch.linalg.vector_norm(both, dim=axes) <= norm * (1 + 1e-5)).all()
    alone = cfg.build(cfg.CFGOptions.model_validate({"scale": 1.3, "renorm": renorm}))
    for row in range(2):
        rows = slice(row, row + 1)
        got = alone.combine(v[rows], {"text": text[rows]}, t[rows])
        assert torch.equal(got, shrunk[rows])


def test_exact_rescaling_gives_each_token_the_conditional_norm() -> None:
    """By hand, tokens on the last axis: norms 5 of v, 10 and 2.5 of what is rescaled."""
    v = torch.tensor([[[[3.0, 4.0], [3.0, 4.0]]]])
    text = torch.tensor([[[[0.0, 0.0], [4.5, 6.0]]]])
    guidance = cfg.build(cfg.CFGOptions(scale=2.0, renorm="channel_exact"))
    plain = cfg.build(cfg.CFGOptions(scale=2.0)).combine(v, {"text": text}, torch.full((1, 1), 0.5))
    torch.testing.assert_close(plain, torch.tensor([[[[6.0, 8.0], [1.5, 2.0]]]]))
    found = guidance.combine(v, {"text": text}, torch.full((1, 1), 0.5))
    torch.testing.assert_close(found, v)
    text = torch.tensor([[[[0.0, 8.0], [6.0, 0.0]]]])
    found = guidance.combine(v, {"text": text}, torch.full((1, 1), 0.5))
    expected = torch.tensor([[[[5.0, 0.0], [0.0, 5.0]]]])  # directions (6, 0) and (0, 8)
    torch.testing.assert_close(found, expected)
    outside = guidance.combine(v, {"text": text}, torch.zeros(1, 1))
    assert torch.equal(outside, v)


def test_the_branch_of_the_image_scale() -> None:
    assert cfg.build(cfg.CFGOptions(image_scale=1.5)).branches == ("text", "image")
    assert cfg.build(cfg.CFGOptions(image_scale=1.0)).branches == ("text",)
    off = cfg.build(cfg.CFGOptions(scale=1.0, image_scale=1.5, renorm="global"))
    assert not off.active(torch.full((1, 3), 0.5)).any()


def test_none_is_the_identity() -> None:
    guidance = none.build(none.NoGuidanceOptions())
    t = torch.tensor([[1.0, 0.5, 0.1]])
    active = guidance.active(t)
    assert guidance.branches == ()
    assert active.dtype == torch.bool
    assert active.shape == t.shape
    assert not active.any()
    assert guidance.combine(V, {}, t) is V


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scale": -1.0}, "scale"),
        ({"interval": (0.5, 0.5)}, "0 <= lo < hi <= 1"),
        ({"interval": (-0.1, 1.0)}, "0 <= lo < hi <= 1"),
        ({"interval": (0.0, 1.1)}, "0 <= lo < hi <= 1"),
        ({"renorm": True}, "renorm"),
        ({"renorm": "local"}, "renorm"),
        ({"image_scale": 0.5}, "image_scale"),
        ({"renorm": "global", "renorm_min": 1.5}, "renorm_min"),
        ({"renorm_min": 0.5}, "does nothing without a renorm that shrinks; got renorm = 'none'"),
        ({"renorm": "channel_exact", "renorm_min": 0.5}, "got renorm = 'channel_exact'"),
        ({"scale": 0.5, "image_scale": 2.0}, "scale must be at least 1; got 0.5"),
        ({"scale": 0.0, "renorm": "channel"}, "scale must be at least 1; got 0.0"),
    ],
)
def test_wrong_options(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        cfg.CFGOptions.model_validate(given)
    with pytest.raises(ValidationError, match="scale"):
        none.NoGuidanceOptions.model_validate({"scale": 1.0})
