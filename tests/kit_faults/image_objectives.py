"""Image objectives with one fault each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from kit_faults import Counted, Faults, drawing
from unigrpo_core import testing
from unigrpo_core.interfaces import ImageObjective
from unigrpo_core.records import Points


class GoodImage(ImageObjective):
    needs: ClassVar = frozenset()
    clips: ClassVar = "nats, of ratios"

    def points(self, segment, scheduler, keys):
        names = ("x_t", "t", "t_next", "noise_level", "x_next", "old_mean")
        stored = {name: getattr(segment, name) for name in names}
        return Points(**stored, kernel=scheduler.transition)

    def log_ratio(self, points, v):
        return points.transition(v).log_ratio(points.x_next, points.old_mean)

    def clip_range(self, latent_elements):
        return 1e-4

    def trust_radius(self, points):
        elements = points.x_t.shape[2:].numel()
        std = points.transition(points.x_t).std.flatten(2).mean(2)
        return self.clip_range(elements) * elements**0.5 * std

    def loss(self, points, velocities, advantages, rewards):
        ratio = self.log_ratio(points, velocities["current"])
        return -ratio.exp() * advantages, {"ratio": ratio.detach()}

    def weights(self, mask):
        return mask.float()


def image_loss(change: Callable[..., Any]) -> Callable[..., Any]:
    def loss(self, points, velocities, advantages, rewards):
        return change(*GoodImage.loss(self, points, velocities, advantages, rewards), velocities)

    return loss


def image_points(**change: Callable[..., Any]) -> Callable[..., Any]:
    def points(self, segment, scheduler, keys):
        found = vars(GoodImage.points(self, segment, scheduler, keys))
        return Points(**{**found, **{name: do(found[name]) for name, do in change.items()}})

    return points


def ratio(change: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, points, v: change(GoodImage.log_ratio(self, points, v))


def overwritten(self, segment, scheduler, keys):
    segment.x_t.zero_()
    return GoodImage.points(self, segment, scheduler, keys)


image = Faults(testing.ImageObjectiveConformance, GoodImage, needs=("std",))
image("test_needs_are_given", "'decode'", needs=frozenset({"decode"}))
image("test_needs_are_given", "", needs=("old",))
image("test_needs_are_given", "fresh is 1", fresh=1)
image("test_needs_are_given", "unit is 'bits'", unit="bits")
image("test_needs_are_given", "clips ''", clips="")
image(
    "test_points_are_those_of_the_images",
    "3 rows of points for 4",
    points=lambda self, *given: GoodImage.points(self, *given).map(lambda value: value[:3]),
)
image(
    "test_points_are_those_of_the_images",
    "towards the data",
    points=image_points(t_next=lambda t: t + 0.4),
)
image("test_points_are_those_of_the_images", "float64", points=image_points(t=lambda t: t.double()))
image("test_points_follow_their_keys", "of random;", points=drawing(GoodImage.points))
image("test_points_follow_their_keys", "input: segment", points=overwritten)
image(
    "test_points_follow_their_keys",
    "x_t of image 2 depends",
    points=image_points(x_t=lambda x: x - x.mean()),
)
image("test_std_is_needed_as_declared", "std is 0", facts={})
image("test_std_is_needed_as_declared", "may need std", facts={"needs": ("v_anchor",)})
image("test_log_ratio_is_zero_for_the_sampler", "allowed", log_ratio=ratio(lambda r: r + 1e-5))
image("test_log_ratio_is_zero_for_the_sampler", r"\(4,\)", log_ratio=ratio(lambda r: r.sum(1)))
image("test_log_ratio_moves_with_the_velocity", "does not move", log_ratio=ratio(lambda r: 0 * r))
image(
    "test_log_ratio_moves_with_the_velocity",
    "another's log-ratio",
    log_ratio=ratio(lambda r: r + r.mean()),
)
image("test_log_ratio_moves_with_the_velocity", "", log_ratio=ratio(lambda r: r + r.detach()))
image("test_clip_range_is_positive", "is 0.0", clip_range=lambda self, elements: 0.0)
image("test_clip_range_is_positive", "None", clip_range=lambda self, elements: None)
image(
    "test_trust_radius_is_where_the_clip_acts",
    "clip range",
    trust_radius=lambda self, points: GoodImage.trust_radius(self, points) * 1.5,
)
image(
    "test_trust_radius_is_where_the_clip_acts",
    "not above 0",
    trust_radius=lambda self, points: 0 * points.t,
)
image(
    "test_trust_radius_is_where_the_clip_acts",
    "finite trust radius",
    clip_range=lambda self, elements: float("inf"),
    trust_radius=lambda self, points: points.t,
)
image(
    "test_values_and_metrics_are_one_per_point",
    r"values: \(4,\)",
    loss=image_loss(lambda values, metrics, v: (values.mean(1), metrics)),
)
image(
    "test_values_and_metrics_are_one_per_point",
    "metrics with gradient: x",
    loss=image_loss(lambda values, metrics, v: (values, {"x": values})),
)
image(
    "test_it_reads_what_it_needs_and_no_more",
    "reads 'old'",
    loss=image_loss(lambda values, metrics, v: (values + 0 * v["old"].mean(), metrics)),
)
image(
    "test_it_reads_what_it_needs_and_no_more",
    "'reference'.*never reads",
    needs=frozenset({"reference"}),
)
image(
    "test_points_are_independent",
    "another's value",
    loss=image_loss(lambda values, metrics, v: (values - values.mean(), metrics)),
)
image("test_nothing_is_drawn_or_changed", "of random;", loss=drawing(GoodImage.loss))
image(
    "test_nothing_is_drawn_or_changed",
    "input: velocities",
    loss=image_loss(lambda values, metrics, v: (values, {"x": v["current"].mul_(2)})),
)
image(
    "test_gradient_follows_the_advantage",
    "slope",
    loss=image_loss(lambda values, metrics, v: (-values, metrics)),
)
image(
    "test_gradient_follows_the_advantage",
    "no gradient",
    loss=image_loss(lambda values, metrics, v: (values.detach(), metrics)),
)
image(
    "test_weights_are_of_the_mask_alone",
    "masked points have weight",
    weights=lambda self, mask: torch.ones(mask.shape),
)
image(
    "test_weights_are_of_the_mask_alone",
    "not close",
    weights=lambda self, mask: mask.float() / mask.sum(),
)
image(
    "test_points_are_those_of_the_images",
    r"x_t: \(4, 3, 24\)",
    points=image_points(x_t=lambda x: x.flatten(2)),
)
image(
    "test_points_are_those_of_the_images",
    r"noise_level: \(4, 1\)",
    points=image_points(noise_level=lambda x: x[:, :1]),
)
image(
    "test_points_are_those_of_the_images",
    "old_mean: not finite",
    points=image_points(old_mean=lambda x: x / 0),
)
image("test_log_ratio_is_zero_for_the_sampler", "float64", log_ratio=ratio(lambda r: r.double()))
image(
    "test_trust_radius_is_where_the_clip_acts",
    r"\(4,\)",
    trust_radius=lambda self, points: GoodImage.trust_radius(self, points)[:, 0],
)
image(
    "test_values_and_metrics_are_one_per_point",
    "ratio: torch.float64",
    loss=image_loss(lambda values, metrics, v: (values, {"ratio": values.detach().double()})),
)
image(
    "test_values_and_metrics_are_one_per_point",
    "values: not finite",
    loss=image_loss(lambda values, metrics, v: (values / 0, metrics)),
)
image(
    "test_it_reads_what_it_needs_and_no_more",
    "never reads the current",
    loss=lambda self, points, velocities, advantages, rewards: (advantages, {}),
)
for says, weigh in {
    "expected": lambda mask: mask.sum(1).float(),
    "float64": lambda mask: mask.double(),
    "carry gradient": lambda mask: mask.float().requires_grad_(),
    "negative": lambda mask: -mask.float(),
    "no weight": lambda mask: 0 * mask.float(),
}.items():
    image(
        "test_weights_are_of_the_mask_alone",
        says,
        weights=lambda self, mask, weigh=weigh: weigh(mask),
    )


def unsteadily(calls: Counted) -> Callable[..., Any]:
    return image_loss(lambda values, metrics, v: (values * calls(), metrics))


image("test_nothing_is_drawn_or_changed", "asked again", loss=unsteadily(Counted()))
image("test_points_are_those_of_the_images", "does not lead to t = 0", fresh=True)
image(
    "test_points_are_those_of_the_images",
    "has noise",
    fresh=True,
    points=image_points(t_next=torch.zeros_like),
)
image(
    "test_points_are_those_of_the_images",
    "not what was sampled",
    fresh=True,
    points=image_points(t_next=torch.zeros_like, noise_level=torch.zeros_like),
)
image(
    "test_it_reads_what_it_needs_and_no_more",
    'needs has "score"',
    loss=lambda self, points, velocities, advantages, rewards: GoodImage.loss(
        self, points, velocities, advantages, points.score(points.x_t)
    ),
)
