"""Text objectives with one fault each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kit_faults import Counted, Faults, drawing
from unigrpo_core import testing
from unigrpo_core.interfaces import TextObjective


class GoodText(TextObjective):
    def loss(self, logps, old_logps, mask, advantages):
        gap = (logps - old_logps).masked_fill(~mask, 0)
        values = -gap.exp() * advantages[:, None] * mask
        return values, {"gap": gap.detach()}

    def weights(self, mask):
        return mask.float()


def text_loss(change: Callable[..., Any]) -> Callable[..., Any]:
    def loss(self, logps, old_logps, mask, advantages):
        found = GoodText.loss(self, logps, old_logps, mask, advantages)
        return change(*found, mask, logps)

    return loss


text = Faults(testing.TextObjectiveConformance, GoodText)
text(
    "test_values_and_metrics_are_one_per_token",
    r"values: \(4,\)",
    loss=text_loss(lambda values, metrics, mask, logps: (values.sum(1), metrics)),
)
text(
    "test_values_and_metrics_are_one_per_token",
    "metrics with gradient: ratio",
    loss=text_loss(lambda values, metrics, mask, logps: (values, {"ratio": values})),
)
text(
    "test_masked_tokens_count_for_nothing",
    "values where masked",
    loss=text_loss(lambda values, metrics, mask, logps: (values + 1, metrics)),
)
text(
    "test_masked_tokens_count_for_nothing",
    "entropy where masked",
    loss=text_loss(lambda values, metrics, mask, logps: (values, {"entropy": -logps.detach()})),
)
text(
    "test_masked_tokens_count_for_nothing",
    "others' values",
    loss=text_loss(lambda values, metrics, mask, logps: (values - 1e-3 * logps.sum() * mask, {})),
)
text(
    "test_masked_tokens_count_for_nothing",
    "gradient reaches masked",
    loss=text_loss(
        lambda values, metrics, mask, logps: (
            values + mask * (logps.sum(1, True) - logps.sum(1, True).detach()),
            metrics,
        )
    ),
)
text(
    "test_rows_are_independent",
    "not close",
    loss=text_loss(lambda values, metrics, mask, logps: (values / mask.sum(), metrics)),
)
text("test_nothing_is_drawn_or_changed", "of random;", loss=drawing(GoodText.loss))
text("test_nothing_is_drawn_or_changed", "of random;", weights=drawing(GoodText.weights))
text(
    "test_nothing_is_drawn_or_changed",
    "input: tokens",
    loss=text_loss(lambda values, metrics, mask, logps: (values, {"x": logps.mul_(2)})),
)
text(
    "test_gradient_follows_the_advantage",
    "gradient at ratio 1",
    loss=text_loss(lambda values, metrics, mask, logps: (-values, metrics)),
)
text(
    "test_gradient_is_that_of_the_values",
    "",
    loss=text_loss(lambda values, metrics, mask, logps: (values + values.detach() * 3, metrics)),
)
text("test_weights_are_of_the_mask_alone", "expected", weights=lambda self, mask: mask.sum(1))
text(
    "test_weights_are_of_the_mask_alone",
    "masked tokens have weight",
    weights=lambda self, mask: torch.ones(mask.shape),
)
text(
    "test_weights_are_of_the_mask_alone",
    "no weight",
    weights=lambda self, mask: mask.float() * (mask.sum(1, True) > 1),
)
text(
    "test_weights_do_not_depend_on_the_micro_batch",
    "not close",
    weights=lambda self, mask: mask.float() / mask.sum(),
)
text(
    "test_weights_do_not_depend_on_the_micro_batch",
    "not close",
    weights=lambda self, mask: mask.float() / mask.shape[1],
)
text(
    "test_values_and_metrics_are_one_per_token",
    "gap: torch.float64",
    loss=text_loss(
        lambda values, metrics, mask, logps: (values, {"gap": values.detach().double()})
    ),
)
text(
    "test_values_and_metrics_are_one_per_token",
    "values: not finite",
    loss=text_loss(lambda values, metrics, mask, logps: (values / 0, metrics)),
)
for says, weigh in {
    "float64": lambda mask: mask.double(),
    "carry gradient": lambda mask: mask.float().requires_grad_(),
    "negative": lambda mask: -mask.float(),
}.items():
    text(
        "test_weights_are_of_the_mask_alone",
        says,
        weights=lambda self, mask, weigh=weigh: weigh(mask),
    )


def unsteadily(calls: Counted) -> Callable[..., Any]:
    return text_loss(lambda values, metrics, mask, logps: (values * calls(), metrics))


text("test_nothing_is_drawn_or_changed", "asked again", loss=unsteadily(Counted()))
text(
    "test_total_is_the_sum_over_rows",
    "",
    total=lambda self, mask: torch.tensor(float(mask.numel())),
)
text(
    "test_total_is_the_sum_over_rows",
    "expected a scalar",
    total=lambda self, mask: mask.float().sum(1),
)
