"""Compiling the repeated units of a network: one graph of each pass, used by all of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

VARIANTS = 32  # of one pass: with and without gradient, and by what its arguments are


def compile_units(units: Iterable[nn.Module]) -> None:
    """Compiles modules of one class in place, for lengths and numbers of rows of any size. What
    cannot be compiled is an error: an eager sampler beside a compiled trainer would round
    otherwise."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    config.fail_on_recompile_limit_hit = True
    for unit in units:
        unit.compile(fullgraph=True, dynamic=True)
