"""What every window keeps: see ``Window`` in :mod:`unigrpo_core.interfaces`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest

from unigrpo_core.interfaces import Window
from unigrpo_core.recipe.slots import WindowSlot
from unigrpo_core.testing.base import LightConformance
from unigrpo_core.testing.samples import keys
from unigrpo_core.testing.watch import no_global_draws

TOTALS = range(1, 51)
"""Numbers of steps of a rollout that the checks try."""


class WindowConformance(LightConformance):
    """Checks of a window."""

    slot = WindowSlot

    def totals(self, window: Window) -> Iterator[tuple[int, int]]:
        """The totals that the window fits into, each with its count."""
        fitting = 0
        for total in TOTALS:
            try:
                count = window.count(total)
            except ValueError:
                continue
            fitting += 1
            yield total, count
        assert fitting, f"it fits into no rollout of {TOTALS[0]} to {TOTALS[-1]} steps"

    def test_steps_are_as_many_as_count_says(self, component: Window) -> None:
        """``len(steps(total, key, rollout)) == count(total)`` for every key, and at least 1."""
        for total, count in self.totals(component):
            assert count >= 1, f"count({total}) is {count}"
            for rollout, key in enumerate(keys(20), 1):
                steps = component.steps(total, key, rollout)
                assert len(steps) == count, f"{steps} of {total}, and count says {count}"

    def test_steps_rise_and_exist(self, component: Window) -> None:
        """A tuple of rising step numbers in 0 .. total - 1."""
        for total, _ in self.totals(component):
            for rollout, key in enumerate(keys(20), 1):
                steps = component.steps(total, key, rollout)
                assert isinstance(steps, tuple), f"{type(steps).__name__}, expected a tuple"
                assert all(type(step) is int for step in steps), f"{steps!r} are no int"
                assert all(one < two for one, two in pairwise(steps)), f"{steps} do not rise"
                assert all(0 <= step < total for step in steps), f"{steps} of {total} steps"

    def test_the_key_decides(self, component: Window, given: dict[str, object]) -> None:
        """The same key and rollout give the same steps: again, in any order, from a window
        built anew."""
        another = self.build(given)
        for total, _ in self.totals(component):
            asked = list(enumerate(keys(20), 1))
            first = [component.steps(total, key, rollout) for rollout, key in asked]
            again = [component.steps(total, key, rollout) for rollout, key in reversed(asked)]
            assert again[::-1] == first, f"{total} steps: another answer when asked again"
            assert [another.steps(total, key, rollout) for rollout, key in asked] == first

    def test_nothing_global_is_drawn(self, component: Window) -> None:
        """The draw comes from the key."""
        with no_global_draws():
            for total, _ in self.totals(component):
                component.steps(total, keys(1)[0], 1)

    def test_what_does_not_fit_is_refused(self, component: Window) -> None:
        """Where ``count`` raises ValueError ``steps`` does too; no window fits into 0 steps."""
        refused = [0]
        for total in TOTALS:
            try:
                component.count(total)
            except ValueError:
                refused.append(total)
        for total in refused:
            for ask in (component.count, lambda n: component.steps(n, keys(1)[0], 1)):
                with pytest.raises(ValueError):
                    ask(total)
