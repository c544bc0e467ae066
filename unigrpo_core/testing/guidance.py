"""What every guidance keeps: see ``Guidance`` in :mod:`unigrpo_core.interfaces`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from unigrpo_core.interfaces import Guidance
from unigrpo_core.recipe.slots import GuidanceSlot
from unigrpo_core.testing.base import LightConformance
from unigrpo_core.testing.samples import normal
from unigrpo_core.testing.watch import Reads, no_global_draws, unchanged


class GuidanceConformance(LightConformance):
    """Checks of a guidance, at 21 times from 1 to 0."""

    slot = GuidanceSlot

    def times(self) -> Tensor:
        """t [B, K], the same in every row."""
        return torch.linspace(1, 0, 21).expand(2, 21).clone()

    def velocities(self, guidance: Guidance) -> tuple[Tensor, dict[str, Tensor]]:
        """Conditional ones [B, K, *], and those of every branch."""
        shape = (2, 21, 3, 4)
        return normal("v", *shape), {name: normal(name, *shape) for name in guidance.branches}

    def only_guided(self, guidance: Guidance) -> Tensor:
        """Where it is active."""
        active = guidance.active(self.times())
        if not active.any():
            pytest.skip("with these options it is nowhere active")
        return active

    def test_branches_are_names(self, component: Guidance) -> None:
        """``branches`` is a tuple of names, each once."""
        names = component.branches
        assert isinstance(names, tuple), f"{names!r} is no tuple"
        assert all(isinstance(name, str) and name for name in names), names
        assert len(set(names)) == len(names), f"{names}: one is named twice"

    def test_active_is_bool_of_the_times(self, component: Guidance) -> None:
        """bool of t's shape, decided for each time alone; never active without a branch."""
        t = self.times()
        active = component.active(t)
        assert active.dtype == torch.bool, f"{active.dtype}"
        assert active.shape == t.shape, f"{tuple(active.shape)}, expected {tuple(t.shape)}"
        alone = [component.active(t[:1, k : k + 1]) for k in range(t.shape[1])]
        assert torch.equal(torch.cat(alone, 1), active[:1]), "active depends on the other times"
        assert component.branches or not active.any(), "active, and it has no branch"

    def test_combined_is_float32_of_the_velocities_shape(self, component: Guidance) -> None:
        """float32 [B, K, *], finite."""
        v, branches = self.velocities(component)
        found = component.combine(v, branches, self.times())
        assert found.shape == v.shape, f"{tuple(found.shape)}, expected {tuple(v.shape)}"
        assert found.dtype == torch.float32, f"{found.dtype}"
        assert torch.isfinite(found).all(), "not finite"

    def test_inactive_leaves_the_velocity_alone(self, component: Guidance) -> None:
        """Where it is not active v comes back bit for bit, whatever the branches are."""
        v, branches = self.velocities(component)
        still = ~component.active(self.times())
        wild = {name: 1e4 * value for name, value in branches.items()}
        found = component.combine(v, wild, self.times())
        assert torch.equal(found[still], v[still]), "it changes velocities where it is not active"

    def test_it_reads_its_branches_and_no_others(self, component: Guidance) -> None:
        """Of the branches it reads those that it names, and each of them if it is ever active."""
        v, branches = self.velocities(component)
        reads = Reads(branches)
        component.combine(v, reads, self.times())
        if component.active(self.times()).any():
            idle = set(branches) - reads.read
            assert not idle, f"it asks for the branches {sorted(idle)} and never reads them"

    def test_active_guidance_guides(self, component: Guidance) -> None:
        """Where it is active every branch makes a difference; else its call is wasted."""
        active = self.only_guided(component)
        v, branches = self.velocities(component)
        before = component.combine(v, branches, self.times())
        for name, value in branches.items():
            after = component.combine(v, {**branches, name: value + 1.0}, self.times())
            same = (after == before).flatten(2).all(2) & active
            assert not same.any(), f"active, and the branch {name!r} changes nothing"

    def test_points_are_independent(self, component: Guidance) -> None:
        """A point's velocity does not depend on other rows or times."""
        v, branches = self.velocities(component)
        before = component.combine(v, branches, self.times())
        v = v.clone()
        v[1, 10] += 2.0
        after = component.combine(v, branches, self.times())
        before[1, 10] = after[1, 10]
        assert torch.equal(after, before), "one point's velocity changes another's"

    def test_gradient_reaches_the_conditional_velocity(self, component: Guidance) -> None:
        """With guidance in training the conditional velocity is trained through it."""
        v, branches = self.velocities(component)
        v.requires_grad_()
        found = component.combine(v, branches, self.times())
        assert found.requires_grad, "no gradient reaches the conditional velocity"
        (gradient,) = torch.autograd.grad(found.sum(), v)
        assert torch.isfinite(gradient).all(), "the gradient is not finite"
        assert gradient.any(), "the gradient is 0 everywhere"

    def test_nothing_is_drawn_or_changed(self, component: Guidance) -> None:
        """No global draw, no input changed, alike when asked again."""
        (v, branches), t = self.velocities(component), self.times()
        with no_global_draws(), unchanged(v=v, branches=branches, t=t):
            first, again = (component.combine(v, branches, t) for _ in range(2))
            component.active(t)
        assert torch.equal(first, again), "another velocity when asked again"

    def test_scale_one_is_the_conditional_velocity(self, given: Mapping[str, Any]) -> None:
        """With an option called ``scale``, 1 means no guidance."""
        if "scale" not in self.found().options.model_fields:
            pytest.skip("it has no option called scale")
        guidance = self.build({**given, "scale": 1.0})
        v, branches = self.velocities(guidance)
        found = guidance.combine(v, branches, self.times())
        torch.testing.assert_close(found, v, atol=1e-6, rtol=1e-6)
