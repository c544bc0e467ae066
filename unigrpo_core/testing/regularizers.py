"""What every regularizer keeps: see ``FlowRegularizer`` and ``TokenRegularizer`` in
:mod:`unigrpo_core.interfaces`, and ``needs`` and ``kind`` of its provider."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from unigrpo_core.interfaces import FlowRegularizer, Scheduler, TokenRegularizer
from unigrpo_core.recipe.slots import FlowRegularizerSlot, RegularizerSlot, Slot
from unigrpo_core.records import FlowStep, TokenStep
from unigrpo_core.testing.base import Conformance
from unigrpo_core.testing.samples import (
    AXES,
    PlainScheduler,
    flow_step,
    gradient_is_right,
    normal,
    token_mask,
    uniform,
)
from unigrpo_core.testing.watch import no_global_draws, unchanged

GAPS = (1e-6, 1e-4, 1e-2, 1.0, 10.0)
"""How far from the anchor the checks go, in units of what is regularized."""


class RegularizerConformance(Conformance):
    """What the two kinds of regularizer share. ``step`` makes what a penalty sees from current
    values and the anchor's, whatever they are: velocities [B, K, *] or log-probs [B, L]."""

    may_need: ClassVar[frozenset[str]]

    def step(self, current: Tensor, anchor: Tensor) -> Any:
        raise NotImplementedError

    def draws(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values to regularize, or to be held on to."""
        raise NotImplementedError

    def penalty(self, component: Any, current: Tensor, anchor: Tensor) -> Tensor:
        found: Tensor = component(self.step(current, anchor))
        return found

    # --- what it says -------------------------------------------------------------------------

    def test_needs_are_fields_of_a_step(self) -> None:
        """``needs`` names fields of the anchor, or "std"."""
        unknown = set(self.found().needs) - self.may_need
        assert not unknown, f"needs {sorted(unknown)}; it may need {sorted(self.may_need)}"

    def test_it_reads_what_it_needs_and_no_more(self, component: Any) -> None:
        """Of the anchor's fields it reads exactly those that ``needs`` names: an undeclared one may
        not be there, a declared one costs a forward of the anchor."""
        needs = set(self.found().needs)
        read: set[str] = set()
        step = self.step(self.draws("current"), self.draws("anchor"))
        component(_watched(step, needs, read))
        idle = (needs - {"std"}) - read
        assert not idle, f"needs {sorted(idle)}, which it never reads"

    # --- values -------------------------------------------------------------------------------

    def test_nothing_global_is_drawn(self, component: Any) -> None:
        """The global generators are left alone."""
        with no_global_draws():
            self.penalty(component, self.draws("current"), self.draws("anchor"))

    def test_inputs_are_left_alone(self, component: Any) -> None:
        """Nothing of the step changes."""
        step = self.step(self.draws("current"), self.draws("anchor"))
        with unchanged(step=step):
            component(step)

    def test_values_are_repeatable(self, component: Any) -> None:
        """The same step gets the same values."""
        current, anchor = self.draws("current"), self.draws("anchor")
        first = self.penalty(component, current, anchor)
        assert torch.equal(self.penalty(component, current, anchor), first)

    def test_zero_at_the_anchor(self, component: Any) -> None:
        """A distance is exactly 0 at the anchor."""
        self.only_distances()
        anchor = self.draws("anchor")
        found = self.penalty(component, anchor.clone(), anchor)
        assert not found.any(), f"at the anchor: {found.tolist()}"

    def test_never_negative(self, component: Any) -> None:
        """A distance is >= 0 wherever it is, also where rounding is all there is, and > 0 far
        away."""
        self.only_distances()
        anchor = self.draws("anchor")
        for gap in GAPS:
            found = self.penalty(component, anchor + gap * self.draws("gap"), anchor)
            assert (found >= 0).all(), f"{found.min().item()} at a gap of {gap}"
            assert torch.isfinite(found).all(), f"not finite at a gap of {gap}"
        assert found.any(), f"0 everywhere at a gap of {gap}"

    def only_distances(self) -> None:
        if self.found().kind != "distance":
            pytest.skip("it is no distance")

    # --- gradients ----------------------------------------------------------------------------

    def test_gradient_reaches_the_current_values(self, component: Any) -> None:
        """A finite gradient, not 0 everywhere, reaches what is trained."""
        current = self.draws("current").requires_grad_()
        values = self.penalty(component, current, self.draws("anchor"))
        assert values.requires_grad, "no gradient reaches the current values"
        (gradient,) = torch.autograd.grad(values.sum(), current)
        assert torch.isfinite(gradient).all(), "the gradient is not finite"
        assert gradient.any(), "the gradient is 0 everywhere"

    def test_gradient_at_the_anchor_is_finite(self, component: Any) -> None:
        """Training begins at the anchor, so the gradient exists there."""
        anchor = self.draws("anchor")
        current = anchor.clone().requires_grad_()
        values = self.penalty(component, current, anchor)
        (gradient,) = torch.autograd.grad(values.sum(), current)
        assert torch.isfinite(gradient).all(), "at the anchor the gradient is not finite"

    def test_gradient_is_that_of_the_values(self, component: Any) -> None:
        """Autograd agrees with differences of the values, in float64."""
        anchor = self.draws("anchor", torch.float64)
        current = anchor + 0.3 * self.draws("gap", torch.float64)
        assert gradient_is_right(lambda free: self.penalty(component, free, anchor), current)


class FlowRegularizerConformance(RegularizerConformance):
    """Checks of a regularizer of velocities, or of transitions."""

    slot: ClassVar[type[Slot]] = FlowRegularizerSlot
    may_need = frozenset({"v_anchor", "transition_anchor", "std"})

    def scheduler(self) -> Scheduler:
        """The scheduler whose transitions the step holds."""
        return PlainScheduler()

    def step(self, current: Tensor, anchor: Tensor) -> FlowStep:
        return flow_step(current, anchor, self.scheduler())

    def draws(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return normal(name, 2, 3, 2, 3, 4, dtype=dtype)

    def test_values_are_one_float32_per_point(self, component: FlowRegularizer) -> None:
        """float32 [B, K], finite, whatever the latent axes."""
        for axes in AXES:
            v, anchor = (normal(name, 2, 3, *axes) for name in ("current", "anchor"))
            found = self.penalty(component, v, anchor)
            assert found.shape == (2, 3), f"{tuple(found.shape)}, expected [B, K] = (2, 3)"
            assert found.dtype == torch.float32, f"{found.dtype}, expected torch.float32"
            assert torch.isfinite(found).all(), f"not finite: {found.tolist()}"

    def test_points_are_independent(self, component: FlowRegularizer) -> None:
        """A point's value does not depend on other rows or points."""
        v, anchor = self.draws("current"), self.draws("anchor")
        before = self.penalty(component, v, anchor)
        other = v.clone()
        other[1, 2] += 3.0
        _only_changed(before, self.penalty(component, other, anchor), (1, 2))

    def test_it_is_a_mean_over_latent_elements(self, component: FlowRegularizer) -> None:
        """The same latents twice over give the same value, so that a weight does not depend on
        the image's size."""

        def twice(value: Tensor) -> Tensor:
            return torch.cat([value, value], -1)

        once = self.step(self.draws("current"), self.draws("anchor"))
        points = (once.t, once.t_next, torch.full_like(once.t, 0.7))
        v, v_anchor, x_t = (twice(value) for value in (once.v, once.v_anchor, once.x_t))
        kernel = self.scheduler().transition
        both = replace(
            once,
            v=v,
            v_anchor=v_anchor,
            x_t=x_t,
            transition=kernel(v, x_t, *points),
            transition_anchor=kernel(v_anchor, x_t, *points),
        )
        torch.testing.assert_close(component(both), component(once), atol=1e-6, rtol=1e-5)

    def test_without_std_in_needs_it_takes_steps_without_noise(
        self, component: FlowRegularizer
    ) -> None:
        """Where std is 0 the value is finite, or ``needs`` says "std"."""
        if "std" in self.found().needs:
            pytest.skip("it needs a std above 0, and says so")
        step = flow_step(self.draws("current"), self.draws("anchor"), self.scheduler(), 0.0)
        found = component(step)
        assert torch.isfinite(found).all(), 'where std is 0: not finite; say needs = ("std",)'


class TokenRegularizerConformance(RegularizerConformance):
    """Checks of a regularizer of tokens' log-probs."""

    slot: ClassVar[type[Slot]] = RegularizerSlot
    may_need = frozenset({"logps_anchor"})

    def step(self, current: Tensor, anchor: Tensor) -> TokenStep:
        return TokenStep(logps=current, logps_anchor=anchor, mask=token_mask())

    def draws(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return -0.1 - uniform(name, 4, 6).to(dtype)

    def test_values_are_one_float32_per_token(self, component: TokenRegularizer) -> None:
        """float32 [B, L], finite."""
        found = self.penalty(component, self.draws("current"), self.draws("anchor"))
        assert found.shape == (4, 6), f"{tuple(found.shape)}, expected [B, L] = (4, 6)"
        assert found.dtype == torch.float32, f"{found.dtype}, expected torch.float32"
        assert torch.isfinite(found).all(), f"not finite: {found.tolist()}"

    def test_masked_tokens_are_zero(self, component: TokenRegularizer) -> None:
        """Where the mask is False the value is 0, and so is the gradient, whatever stands there."""
        mask = token_mask()
        current = self.draws("current").masked_fill(~mask, -40.0).requires_grad_()
        found = self.penalty(component, current, self.draws("anchor"))
        assert not found[~mask].any(), f"masked: {found[~mask].tolist()}"
        (gradient,) = torch.autograd.grad(found.sum(), current)
        assert not gradient[~mask].any(), "gradient reaches masked tokens"

    def test_rows_are_independent(self, component: TokenRegularizer) -> None:
        """A row's values do not depend on other rows."""
        current, anchor = self.draws("current"), self.draws("anchor")
        before = self.penalty(component, current, anchor)
        other = current.clone()
        other[2] -= 0.5
        _only_changed(before, self.penalty(component, other, anchor), (2,))


def _only_changed(before: Tensor, after: Tensor, place: tuple[int, ...]) -> None:
    """Whether values changed at no other place."""
    rest = torch.ones_like(before, dtype=torch.bool)
    rest[place] = False
    assert torch.equal(before[rest], after[rest]), f"a change at {list(place)} is felt elsewhere"


def _watched(step: Any, allowed: set[str], read: set[str]) -> Any:
    """The step, of which the anchor's fields can be read only if allowed; what was read is put
    into ``read``."""
    anchors = {field.name for field in fields(step) if "anchor" in field.name}
    look: Callable[[object, str], Any] = object.__getattribute__

    class Watched(type(step)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name in anchors:
                if name not in allowed:
                    raise AssertionError(f"it reads {name!r}, which needs does not name")
                read.add(name)
            return look(self, name)

    return Watched(**{field.name: getattr(step, field.name) for field in fields(step)})
