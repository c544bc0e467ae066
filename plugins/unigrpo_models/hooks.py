"""Registers the policies."""

from __future__ import annotations

from unigrpo_core.plugin import Providers, hookimpl
from unigrpo_models.bagel import provider
from unigrpo_models.causal import provider as causal
from unigrpo_models.composed import provider as composed
from unigrpo_models.painters.provider import PROVIDERS


@hookimpl
def unigrpo_policies() -> Providers:
    yield provider.PROVIDER
    yield causal.PROVIDER
    yield composed.PROVIDER
    yield from PROVIDERS
