"""What every image objective keeps: see ``ImageObjective`` in :mod:`unigrpo_core.interfaces`."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from unigrpo_core.interfaces import ImageObjective, Scheduler
from unigrpo_core.recipe.slots import ImageObjectiveSlot
from unigrpo_core.records import ImageSegment, Points, Unit
from unigrpo_core.testing.base import LightConformance
from unigrpo_core.testing.samples import (
    PlainScheduler,
    field,
    gradient_is_right,
    image_segment,
    keys,
    normal,
    wide,
)
from unigrpo_core.testing.watch import Reads, no_global_draws, unchanged

TENSORS = tuple(item.name for item in fields(Points) if item.name not in ("kernel", "score"))
VELOCITIES = frozenset({"old", "reference", "ema"})


class ImageObjectiveConformance(LightConformance):
    """Checks of a loss on velocities. The points are those of four images, sampled in three
    stochastic steps by the velocities of :func:`unigrpo_core.testing.samples.field`."""

    slot = ImageObjectiveSlot

    def scheduler(self) -> Scheduler:
        """The scheduler that sampled the images."""
        return PlainScheduler()

    def segment(self) -> ImageSegment:
        return image_segment(self.scheduler())

    def points(
        self, objective: ImageObjective, segment: ImageSegment | None = None
    ) -> tuple[Points, Tensor]:
        """The objective's points of a segment, and the sampler's velocities there; at fresh ones
        the old means are theirs, as the trainer sets them."""
        segment = self.segment() if segment is None else segment
        drawn = objective.points(segment, self.scheduler(), keys(len(segment.latents)))
        v = field(drawn.x_t, drawn.t)
        points = replace(drawn, score=lambda latents: latents.tanh().flatten(2).mean(2))
        return (
            replace(points, old_mean=points.transition(v).mean) if objective.fresh else points
        ), v

    def asked(self, objective: ImageObjective, points: Points, v: Tensor) -> dict[str, Tensor]:
        """The velocities that the objective is given: the current, and those that it needs."""
        others = {
            name: v.detach() + 0.01 * normal(name, *v.shape).to(v.dtype)
            for name in objective.needs & VELOCITIES
        }
        return {"current": v, **others}

    def advantages(self, points: Points) -> Tensor:
        """float32 [B, K], positive for the first two images, negative for the last two."""
        return torch.tensor([1.5, 0.5, -0.5, -1.5])[:, None].expand_as(points.t).clone()

    def loss(
        self, objective: ImageObjective, points: Points, v: Tensor, advantages: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        given = self.advantages(points) if advantages is None else advantages
        return objective.loss(points, self.asked(objective, points, v), given, given + 2.0)

    # --- points -------------------------------------------------------------------------------

    def test_needs_are_given(self, component: ImageObjective) -> None:
        """``needs`` is a frozenset of "old", "reference", "ema" and "score"; ``fresh`` is a bool,
        ``unit`` a unit of log-ratios or None; ``clips`` says what is bounded if anything is."""
        assert isinstance(component.needs, frozenset), f"{component.needs!r}"
        unknown = component.needs - VELOCITIES - {"score"}
        assert not unknown, f"needs {sorted(unknown)}, which nobody computes"
        assert isinstance(component.fresh, bool), f"fresh is {component.fresh!r}"
        assert component.unit in (None, *get_args(Unit)), f"unit is {component.unit!r}"
        bound = component.clip_range(24)
        assert bool(component.clips) == math.isfinite(bound), (
            f"the clip range is {bound}, and clips {component.clips!r}"
        )

    def test_points_are_those_of_the_images(self, component: ImageObjective) -> None:
        """Finite float32 [E, K, *] and [E, K], with times that fall and a transition at each;
        fresh ones step to t = 0 without noise, and end at what was sampled."""
        points, v = self.points(component)
        rows, count = points.t.shape
        assert rows == 4, f"{rows} rows of points for 4 images"
        for name in ("x_t", "x_next", "old_mean"):
            shape = tuple(getattr(points, name).shape)
            assert shape == (rows, count, 2, 3, 4), f"{name}: {shape}"
        for name in TENSORS:
            value = getattr(points, name)
            assert value.dtype == torch.float32, f"{name}: {value.dtype}"
            assert value.shape[:2] == (rows, count), f"{name}: {tuple(value.shape)}"
            assert torch.isfinite(value).all(), f"{name}: not finite"
        assert (points.t_next < points.t).all(), "a step does not go towards the data"
        assert points.transition(v).mean.shape == v.shape
        if component.fresh:
            assert not points.t_next.any(), "a fresh step does not lead to t = 0"
            assert not points.noise_level.any(), "a fresh step has noise"
            data = self.segment().latents[:, None].expand_as(points.x_next)
            assert torch.equal(points.x_next, data), "x_next is not what was sampled"

    def test_points_follow_their_keys(self, component: ImageObjective) -> None:
        """The points of an image depend on it and its key alone, and on no global draw."""
        segment, scheduler, names = self.segment(), self.scheduler(), keys(4)
        with no_global_draws(), unchanged(segment=segment):
            together = component.points(segment, scheduler, names)
        for row in (2, 0):
            part = {f.name: getattr(segment, f.name)[row : row + 1] for f in fields(segment)}
            alone = component.points(ImageSegment(**part), scheduler, names[row : row + 1])
            for name in TENSORS:
                got, expected = getattr(alone, name)[0], getattr(together, name)[row]
                assert torch.equal(got, expected), f"{name} of image {row} depends on the others"

    def test_std_is_needed_as_declared(self, component: ImageObjective) -> None:
        """The provider's ``needs`` is ("std",), or values are finite where std is 0 too."""
        needs = set(self.found().needs)
        assert needs <= {"std"}, f"the provider needs {sorted(needs)}; it may need std"
        if needs:
            pytest.skip("it needs a std above 0, and says so")
        points, v = self.points(component, image_segment(self.scheduler(), noise_level=0.0))
        values, _ = self.loss(component, points, v)
        assert torch.isfinite(values).all(), 'where std is 0: not finite; say needs = ("std",)'

    # --- log-ratios and the clip --------------------------------------------------------------

    def test_log_ratio_is_zero_for_the_sampler(self, component: ImageObjective) -> None:
        """[B, K], 0 to rounding for the velocities that sampled: at most a twentieth of the clip
        range, and 1e-6."""
        points, v = self.points(component)
        found = component.log_ratio(points, v)
        assert found.shape == points.t.shape, f"{tuple(found.shape)}"
        assert found.dtype == torch.float32, f"{found.dtype}"
        limit = min(1e-6, 0.05 * component.clip_range(24))
        assert (found.abs() <= limit).all(), f"{found.abs().max().item()}, allowed {limit}"

    def test_log_ratio_moves_with_the_velocity(self, component: ImageObjective) -> None:
        """Each point's with its own, by a gradient that is that of the values in float64."""
        points, v = self.points(component)
        before = component.log_ratio(points, v)
        moved = v.clone()
        moved[1, 1] += 0.1
        after = component.log_ratio(points, moved)
        assert after[1, 1] != before[1, 1], "it does not move with the velocity"
        after[1, 1] = before[1, 1]
        assert torch.equal(after, before), "one point's velocity moves another's log-ratio"
        exact = points.map(lambda value: value.double())
        assert gradient_is_right(lambda free: component.log_ratio(exact, free), v.double() + 0.1)

    def test_clip_range_is_positive(self, component: ImageObjective) -> None:
        """A float above 0 (infinite without clipping) for every number of latent elements."""
        for elements in (1, 24, 262_144):
            clip = component.clip_range(elements)
            assert isinstance(clip, float), f"clip_range({elements}) is {clip!r}"
            assert clip > 0, f"clip_range({elements}) is {clip}"

    def test_trust_radius_is_where_the_clip_acts(self, component: ImageObjective) -> None:
        """[B, K] above 0: for means shifted by that rms, the log-ratio's standard deviation over
        the noise of sampling is the clip range, to a fifth."""
        points, _ = self.points(component)
        radius = component.trust_radius(points)
        assert radius.shape == points.t.shape, f"{tuple(radius.shape)}"
        assert (radius > 0).all(), f"not above 0: {radius.tolist()}"
        clip = component.clip_range(24)
        if math.isinf(clip):
            assert torch.isinf(radius).all(), "no clipping, and a finite trust radius"
            return
        if component.fresh:
            pytest.skip("no sampler's noise moves the log-ratio at fresh points")
        rows = 400
        segment = image_segment(self.scheduler(), rows=rows, dtype=torch.float64)
        many = component.points(segment, self.scheduler(), keys(rows))
        drift = normal("drift", *many.x_t.shape, dtype=torch.float64)
        drift = drift / drift.flatten(2).square().mean(2).sqrt()[..., None, None, None]
        shift = drift * wide(component.trust_radius(many), drift)
        v = field(many.x_t, many.t)
        # Small enough that a mean is linear in its velocity: any scheduler's is.
        slope = many.transition(v + 1.0).mean - many.transition(v).mean
        spread = component.log_ratio(many, v + shift / slope).std(0)
        assert (spread / clip - 1).abs().max() < 0.2, f"{spread.tolist()}, clip range {clip}"

    # --- values -------------------------------------------------------------------------------

    def test_values_and_metrics_are_one_per_point(self, component: ImageObjective) -> None:
        """Values and every metric are finite float32 [B, K]; metrics carry no gradient."""
        points, v = self.points(component)
        values, metrics = self.loss(component, points, v.requires_grad_())
        for name, value in {"values": values, **metrics}.items():
            assert value.shape == points.t.shape, f"{name}: {tuple(value.shape)}"
            assert value.dtype == torch.float32, f"{name}: {value.dtype}"
            assert torch.isfinite(value).all(), f"{name}: not finite"
        held = [name for name, value in metrics.items() if value.requires_grad]
        assert not held, f"metrics with gradient: {', '.join(held)}"

    def test_it_reads_what_it_needs_and_no_more(self, component: ImageObjective) -> None:
        """Of the velocities it reads the current and exactly those that ``needs`` names."""
        points, v = self.points(component)
        reads, given = Reads(self.asked(component, points, v)), self.advantages(points)
        scored: list[Tensor] = []
        score = points.score
        assert score is not None

        def counted(latents: Tensor) -> Tensor:
            scored.append(latents)
            return score(latents)

        component.loss(replace(points, score=counted), reads, given, given)
        assert "current" in reads.read, "it never reads the current velocity"
        assert bool(scored) <= ("score" in component.needs), 'it scores: say so, needs has "score"'
        idle = component.needs - reads.read - ({"score"} if scored else set())
        assert not idle, f"needs {sorted(idle)}, which it never reads"

    def test_points_are_independent(self, component: ImageObjective) -> None:
        """A point's value does not depend on other rows or points."""
        points, v = self.points(component)
        before, _ = self.loss(component, points, v)
        given, moved = self.advantages(points), v.clone()
        moved[2, 1] += 0.1
        given[2, 1] = 0.3
        after = self.loss(component, points, moved, given)[0].clone()
        after[2, 1] = before[2, 1]
        assert torch.equal(after, before), "one point changes another's value"

    def test_nothing_is_drawn_or_changed(self, component: ImageObjective) -> None:
        """No global draw, no input changed, alike when asked again."""
        points, v = self.points(component)
        given = self.asked(component, points, v)
        advantages = self.advantages(points)
        inputs = {"points": points, "velocities": given, "advantages": advantages}
        with no_global_draws(), unchanged(**inputs):
            first, again = (
                component.loss(points, given, advantages, advantages)[0] for _ in range(2)
            )
        assert torch.equal(first, again), "other values when asked again"

    def test_gradient_follows_the_advantage(self, component: ImageObjective) -> None:
        """At ratio 1 a step down the loss raises the log-ratio of a positive advantage and lowers
        that of a negative one; each point's gradient reaches its own velocity."""
        points, v = self.points(component)
        v.requires_grad_()
        (uphill,) = torch.autograd.grad(component.log_ratio(points, v).sum(), v)
        values, _ = self.loss(component, points, v)
        assert values.requires_grad, "no gradient reaches the velocity"
        (gradient,) = torch.autograd.grad(values.sum(), v)
        along = (gradient * uphill).flatten(2).sum(2)
        wrong = along.sign() != -self.advantages(points).sign()
        assert not wrong.any(), f"slope of the loss along the log-ratio: {along.tolist()}"

    # --- weights ------------------------------------------------------------------------------

    def test_weights_are_of_the_mask_alone(self, component: ImageObjective) -> None:
        """float32 [B, K], >= 0, without gradient, 0 where the mask is False, each row's its own."""
        mask = torch.tensor([[True, True, True], [True, False, True], [True, True, False]])
        weights = component.weights(mask)
        assert weights.shape == mask.shape, f"{tuple(weights.shape)}, expected {tuple(mask.shape)}"
        assert weights.dtype == torch.float32, f"{weights.dtype}"
        assert not weights.requires_grad, "weights carry gradient"
        assert (weights >= 0).all(), "a weight is negative"
        assert not weights[~mask].any(), "masked points have weight"
        assert (weights.sum(1) > 0).all(), "a row has no weight"
        for row in range(len(mask)):
            alone = component.weights(mask[row : row + 1])
            torch.testing.assert_close(alone, weights[row : row + 1], atol=0, rtol=1e-6)
