"""Windows with one fault each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from kit_faults import Counted, Faults, drawing
from unigrpo_core import testing
from unigrpo_core.interfaces import Window


class GoodWindow(Window):
    size: ClassVar = 3

    def count(self, total):
        if total < self.size:
            raise ValueError(f"{self.size} steps do not fit into {total}")
        return self.size

    def steps(self, total, key, rollout):
        begin = key.integer(total - self.count(total) + 1)
        return tuple(range(begin, begin + self.size))


def steps(change: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, total, key, rollout: change(GoodWindow.steps(self, total, key, rollout))


def once_more(self: Any, total: int, key: Any, rollout: int) -> Any:
    self.calls = getattr(self, "calls", 0) + 1
    return GoodWindow.steps(self, total, key.child(self.calls), rollout)


class Numbered(GoodWindow):
    """Every one that is built draws differently."""

    built = Counted()

    def __init__(self):
        self.number = self.built()

    def steps(self, total, key, rollout):
        return super().steps(total, key.child(self.number), rollout)


window = Faults(testing.WindowConformance, GoodWindow)
window("test_steps_are_as_many_as_count_says", "count says 3", steps=steps(lambda s: s[:2]))
window("test_steps_are_as_many_as_count_says", "fits into no rollout", size=90)
window("test_steps_rise_and_exist", "do not rise", steps=steps(lambda s: s[::-1]))
window("test_steps_rise_and_exist", "of 3 steps", steps=steps(lambda s: tuple(i + 1 for i in s)))
window("test_steps_rise_and_exist", "expected a tuple", steps=steps(list))
window("test_steps_rise_and_exist", "no int", steps=steps(lambda s: tuple(map(float, s))))
window("test_the_key_decides", "when asked again", steps=once_more)
window("test_nothing_global_is_drawn", "of random;", steps=drawing(GoodWindow.steps))
window("test_what_does_not_fit_is_refused", "DID NOT RAISE", count=lambda self, total: self.size)
window(
    "test_what_does_not_fit_is_refused",
    "DID NOT RAISE",
    steps=lambda self, total, key, rollout: tuple(range(min(total, self.size))),
)
window("test_the_key_decides", "", build=Numbered)
