"""What the tests of text objectives share: their providers, drawn log-probs, an update's loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from unigrpo_methods import hooks

from unigrpo_core.interfaces import TextObjective
from unigrpo_core.plugin import Provider

PROVIDERS = {provider.name: provider for provider in hooks.unigrpo_text_objectives()}


def objective(name: str, **options: Any) -> TextObjective:
    provider: Provider = PROVIDERS[name]
    return provider.build(provider.options.model_validate(options))


def drawn(lengths: tuple[int, ...], spread: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logps, old_logps, mask and advantages of both signs, float64; log-ratios of that spread."""
    generator = torch.Generator().manual_seed(3)
    shape = (len(lengths), max(lengths))
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    old = -0.1 - 2 * torch.rand(shape, generator=generator, dtype=torch.float64)
    gap = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    advantages[:2] = torch.tensor([1.5, -0.7])
    return (old + gap).masked_fill(~mask, 0), old.masked_fill(~mask, 0), mask, advantages


def update(one: TextObjective, given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The loss of the update, and its gradient by the log-probs."""
    logps, old, mask, advantages = given
    logps = logps.clone().requires_grad_()
    values, _ = one.loss(logps, old, mask, advantages)
    loss = (values * one.weights(mask)).sum() / one.total(mask)
    return loss.detach(), torch.autograd.grad(loss, logps)[0]
