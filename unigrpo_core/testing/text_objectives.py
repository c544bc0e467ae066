"""What every text objective keeps: see ``TextObjective`` in :mod:`unigrpo_core.interfaces`."""

from __future__ import annotations

import torch
from torch import Tensor

from unigrpo_core.interfaces import TextObjective
from unigrpo_core.recipe.slots import TextObjectiveSlot
from unigrpo_core.testing.base import Conformance
from unigrpo_core.testing.samples import gradient_is_right, normal, token_mask, uniform
from unigrpo_core.testing.watch import no_global_draws, unchanged

ADVANTAGES = (1.5, -0.5, 0.0, -1.0)


class TextObjectiveConformance(Conformance):
    """Checks of a loss on the log-probs of sampled tokens."""

    slot = TextObjectiveSlot

    def tokens(self, drift: float = 0.01) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """logps, old_logps, mask [B, L] and advantages [B]; 0 where the mask is False."""
        mask = token_mask()
        old = (-0.2 - uniform("old logps", 4, 6)).masked_fill(~mask, 0)
        logps = (old + drift * normal("drift", 4, 6)).masked_fill(~mask, 0)
        return logps, old, mask, torch.tensor(ADVANTAGES)

    # --- values -------------------------------------------------------------------------------

    def test_values_and_metrics_are_one_per_token(self, component: TextObjective) -> None:
        """Values and every metric are finite float32 [B, L]; metrics carry no gradient."""
        logps, *rest = self.tokens()
        values, metrics = component.loss(logps.requires_grad_(), *rest)
        for name, value in {"values": values, **metrics}.items():
            assert value.shape == (4, 6), f"{name}: {tuple(value.shape)}, expected (4, 6)"
            assert value.dtype == torch.float32, f"{name}: {value.dtype}"
            assert torch.isfinite(value).all(), f"{name}: not finite"
        held = [name for name, value in metrics.items() if value.requires_grad]
        assert not held, f"metrics with gradient: {', '.join(held)}"

    def test_masked_tokens_count_for_nothing(self, component: TextObjective) -> None:
        """Where the mask is False values, metrics and gradient are 0, whatever stands there, and
        the other values are as before."""
        logps, old, mask, advantages = self.tokens()
        before, _ = component.loss(logps, old, mask, advantages)
        odd = logps.masked_fill(~mask, -40.0).requires_grad_()
        values, metrics = component.loss(odd, old, mask, advantages)
        for name, value in {"values": values, **metrics}.items():
            assert not value[~mask].any(), f"{name} where masked: {value[~mask].tolist()}"
        assert torch.equal(values[mask], before[mask]), "masked tokens change others' values"
        (gradient,) = torch.autograd.grad(values.sum(), odd)
        assert not gradient[~mask].any(), "gradient reaches masked tokens"

    def test_rows_are_independent(self, component: TextObjective) -> None:
        """A row's values depend neither on other rows nor on the padding."""
        logps, old, mask, advantages = self.tokens()
        together, _ = component.loss(logps, old, mask, advantages)
        for row, length in enumerate(mask.sum(1).tolist()):
            part = (slice(row, row + 1), slice(0, length))
            tokens = (logps[part], old[part], mask[part])
            alone, _ = component.loss(*tokens, advantages[row : row + 1])
            torch.testing.assert_close(alone, together[part], atol=1e-7, rtol=1e-6)

    def test_nothing_is_drawn_or_changed(self, component: TextObjective) -> None:
        """No global draw, no input changed, alike when asked again."""
        tokens = self.tokens()
        with no_global_draws(), unchanged(tokens=tokens):
            first, again = (component.loss(*tokens)[0] for _ in range(2))
            component.weights(tokens[2])
        assert torch.equal(first, again), "other values when asked again"

    # --- gradients ----------------------------------------------------------------------------

    def test_gradient_follows_the_advantage(self, component: TextObjective) -> None:
        """At ratio 1 a step down the loss raises the log-probs of a positive advantage, lowers
        those of a negative one, and leaves those of 0 alone."""
        logps, old, mask, advantages = self.tokens(drift=0.0)
        values, _ = component.loss(logps.requires_grad_(), old, mask, advantages)
        (gradient,) = torch.autograd.grad(values.sum(), logps)
        wanted = -advantages.sign()[:, None].expand(4, 6)
        wrong = (gradient.sign() != wanted) & mask
        assert not wrong.any(), f"gradient at ratio 1: {gradient.tolist()} for {ADVANTAGES}"

    def test_gradient_is_that_of_the_values(self, component: TextObjective) -> None:
        """Autograd agrees with differences of the values, in float64."""
        logps, old, mask, advantages = self.tokens()
        rest = (old.double(), mask, advantages.double())
        assert gradient_is_right(lambda free: component.loss(free, *rest)[0], logps)

    # --- weights ------------------------------------------------------------------------------

    def test_weights_are_of_the_mask_alone(self, component: TextObjective) -> None:
        """[B, L], >= 0, without gradient, 0 where masked, and more than 0 for every row."""
        mask = token_mask()
        weights = component.weights(mask)
        assert weights.shape == mask.shape, f"{tuple(weights.shape)}, expected {tuple(mask.shape)}"
        assert weights.dtype == torch.float32, f"{weights.dtype}"
        assert not weights.requires_grad, "weights carry gradient"
        assert (weights >= 0).all(), "a weight is negative"
        assert not weights[~mask].any(), "masked tokens have weight"
        assert (weights.sum(1) > 0).all(), "a row has no weight"

    def test_weights_do_not_depend_on_the_micro_batch(self, component: TextObjective) -> None:
        """A row's weights are the same alone, and without its padding: they are summed over the
        whole update and used in parts of it."""
        mask = token_mask()
        together = component.weights(mask)
        for row, length in enumerate(mask.sum(1).tolist()):
            alone = component.weights(mask[row : row + 1, :length])
            torch.testing.assert_close(alone, together[row : row + 1, :length], atol=0, rtol=1e-6)

    def test_total_is_the_sum_over_rows(self, component: TextObjective) -> None:
        """A float32 scalar above 0, without gradient: the sum of what each row alone has, with its
        padding or without."""
        mask = token_mask()
        total = component.total(mask)
        assert total.shape == (), f"{tuple(total.shape)}, expected a scalar"
        assert total.dtype == torch.float32, f"{total.dtype}"
        assert not total.requires_grad, "the total carries gradient"
        assert total > 0, f"the total is {total.item()}"
        lengths = mask.sum(1).tolist()
        alone = [component.total(mask[row : row + 1, :n]) for row, n in enumerate(lengths)]
        torch.testing.assert_close(torch.stack(alone).sum(), total, atol=0, rtol=1e-6)
