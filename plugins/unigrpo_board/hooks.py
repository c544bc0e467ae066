"""Registers the embedded world."""

from __future__ import annotations

from unigrpo_board import prompts, rewards, scorer
from unigrpo_core.plugin import Providers, hookimpl


@hookimpl
def unigrpo_prompts() -> Providers:
    yield prompts.PROVIDER


@hookimpl
def unigrpo_rewards() -> Providers:
    yield rewards.PROVIDER
    yield scorer.PROVIDER
