"""Broken on purpose: what it imports is not there."""

from a_library_that_is_not_there import colorfulness

from unigrpo_core.plugin import Provider, hookimpl


@hookimpl
def unigrpo_rewards():
    yield Provider(name="never", build=lambda options: colorfulness, range=(0.0, 1.0))
