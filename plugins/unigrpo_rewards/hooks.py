"""Rewards by rule or by a learned judge, and prompts from files; light until one is used."""

from __future__ import annotations

from collections.abc import Iterator

from unigrpo_core.plugin import Provider, hookimpl
from unigrpo_rewards import brightness, file_prompts, pattern, pickscore, random_reward


@hookimpl
def unigrpo_rewards() -> Iterator[Provider]:
    yield brightness.PROVIDER
    yield random_reward.PROVIDER
    yield pickscore.PROVIDER
    yield pattern.PROVIDER


@hookimpl
def unigrpo_prompts() -> Iterator[Provider]:
    yield file_prompts.PROVIDER
