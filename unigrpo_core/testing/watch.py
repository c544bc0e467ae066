"""Watching what a component does beside returning something: changes, draws, reads."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@contextmanager
def no_global_draws() -> Iterator[None]:
    """Inside it nothing may draw from a global generator, nor seed one."""

    def states() -> dict[str, Any]:
        name, words, *rest = np.random.get_state()
        found = {
            "random": random.getstate(),
            "numpy.random": (name, np.asarray(words).tolist(), *rest),
            "torch": torch.get_rng_state().tolist(),
        }
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            found["torch.cuda"] = [state.tolist() for state in torch.cuda.get_rng_state_all()]
        return found

    before = states()
    yield
    moved = [name for name, state in states().items() if state != before.get(name, state)]
    assert not moved, f"it draws from the global generator of {', '.join(moved)}; draw from keys"


@contextmanager
def unchanged(**inputs: Any) -> Iterator[None]:
    """Inside it none of the inputs may change."""
    before = {name: _copy(value) for name, value in inputs.items()}
    yield
    changed = [name for name, value in inputs.items() if not equal(before[name], value)]
    assert not changed, f"it changes its input: {', '.join(changed)}"


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _copy(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return value if callable(value) else deepcopy(value)


def equal(one: Any, two: Any) -> bool:
    """Whether two values are the same to the last bit: tensors by type, shape and content, records
    by their fields, mappings and sequences item by item."""
    one, two = _copy(one), _copy(two)
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.dtype != two.dtype or one.shape != two.shape:
            return False
        if not one.is_floating_point():
            return torch.equal(one, two)
        numbers = torch.equal(one.nan_to_num(), two.nan_to_num())
        return numbers and torch.equal(one.isnan(), two.isnan())
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(equal, one, two))
    return bool(one == two)


class Reads(Mapping[str, Tensor]):
    """A mapping that remembers what was read, and refuses what was not declared."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values_ = dict(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.values_:
            raise AssertionError(f"it reads {name!r}, which it did not declare")
        self.read.add(name)
        return self.values_[name]

    def __contains__(self, name: object) -> bool:
        return name in self.values_

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)
