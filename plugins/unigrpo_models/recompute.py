"""Activation checkpointing: what a backward pass computes again instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from unigrpo_core.plugin import Checkpointing

aten = torch.ops.aten
DEAR = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)
"""Products and attention: their outputs are kept by "selective"; all else is elementwise, and cheap
to compute again, bit for bit."""


def recomputed(mode: Checkpointing, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``run(*args, **kwargs)``, of which the backward keeps the arguments only ("full"), or also
    what products and attention gave ("selective")."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _choose)
    return checkpoint(partial(_without_memory, run), *args, **options, **kwargs)


def _without_memory(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The pass with every cast of autocast made anew: what it remembers of earlier passes is gone
    in the backward, which has to do the same operations."""
    device = next(x.device.type for x in args if isinstance(x, torch.Tensor))
    on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    with torch.autocast(device, dtype, enabled=on, cache_enabled=False):
        return run(*args, **kwargs)


def _choose(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in DEAR
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
