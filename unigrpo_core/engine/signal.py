"""How much of a gradient is signal: the cosine between the gradients of the halves of an update.

Two halves with gradients g + n1 and g + n2 of independent noise have an expected cosine of about
|g|^2 / (|g|^2 + |n|^2): 0 where there is only noise, 1 where there is none. A cosine of c is a
signal-to-noise ratio (of powers, of the whole update) of 2 c / (1 - c).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from unigrpo_core.recipe.schema import Expert


def halves(rows: Tensor, owner: Tensor) -> tuple[Tensor, ...]:
    """Rows [B] of a training set in two parts of whole prompts (``owner[row]`` is a row's), which
    differ by one prompt at most; all in one where there is but one prompt."""
    prompts = torch.unique(owner[rows])
    if len(prompts) < 2:
        return (rows,)
    first = torch.isin(owner[rows], prompts[: len(prompts) // 2])
    return rows[first], rows[~first]


class Signal:
    """Measures one update; it keeps a copy of the first half's gradients."""

    def __init__(self, experts: Mapping[Expert, Sequence[nn.Parameter]]) -> None:
        self.experts = experts
        self._first: dict[Expert, list[Tensor]] | None = None

    def half(self) -> None:
        """To be called when the gradients are those of the first half."""
        self._first = {
            expert: [_gradient(p).clone() for p in parameters]
            for expert, parameters in self.experts.items()
        }

    def metrics(self) -> dict[str, float]:
        """The cosine of every expert, from the gradients of both halves together; none where a half
        has no gradient at all, or there was no half."""
        found: dict[str, float] = {}
        for expert, parts in (self._first or {}).items():
            dot = square = other = 0.0
            for parameter, first in zip(self.experts[expert], parts, strict=True):
                second = _gradient(parameter) - first
                dot += float((first * second).sum(dtype=torch.float64))
                square += float(first.square().sum(dtype=torch.float64))
                other += float(second.square().sum(dtype=torch.float64))
            if square and other:
                found[f"{expert}/grad_cosine"] = dot / (square * other) ** 0.5
        return found


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
