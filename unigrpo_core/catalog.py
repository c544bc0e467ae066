"""Finds plugins through their entry points, each in isolation, and resolves names.

A broken plugin is listed with its distribution, version and reason, and harms only a recipe that
names something of it. Two plugins with one name make the bare name ambiguous, which matters only
when it is used; ``distribution:name`` is always exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import EntryPoint, distributions

import pluggy

from unigrpo_core.errors import PluginError
from unigrpo_core.plugin import KINDS, PROJECT, Hooks, Options, Provider

GROUP = "unigrpo"


@dataclass(frozen=True)
class Component:
    """A provider with where it comes from."""

    kind: str
    provider: Provider
    distribution: str
    version: str

    @property
    def name(self) -> str:
        return self.provider.name

    @property
    def origin(self) -> str:
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True)
class Broken:
    """A plugin that could not be used, and why."""

    entry: str
    distribution: str
    version: str
    reason: str

    def __str__(self) -> str:
        return f"plugin {self.entry!r} of {self.distribution} {self.version}: {self.reason}"


@dataclass(frozen=True)
class Catalog:
    """What is installed."""

    components: tuple[Component, ...]
    broken: tuple[Broken, ...] = field(default=())

    def of(self, kind: str) -> tuple[Component, ...]:
        return tuple(item for item in self.components if item.kind == kind)

    def find(self, kind: str, name: str) -> Component:
        """The component of that kind called ``name`` or ``distribution:name``.

        Raises:
            PluginError: there is none (the message names near misses and broken plugins), or
                several share the bare name.
        """
        distribution, _, bare = name.rpartition(":")
        known = self.of(kind)
        matches = [
            item
            for item in known
            if item.name == bare and (not distribution or item.distribution == distribution)
        ]
        if len(matches) == 1:
            return matches[0]
        label = kind.replace("_", " ")
        if matches:
            exact = " or ".join(f'"{item.distribution}:{item.name}"' for item in matches)
            raise PluginError(f"several plugins have a {label} called {name!r}; say {exact}")
        names = sorted({item.name for item in known})
        near = get_close_matches(bare, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(names)}"
        broken = "".join(f"\n  broken: {item}" for item in self.broken)
        raise PluginError(f"no {label} called {name!r}{hint}{broken}")


def load_catalog() -> Catalog:
    """Loads every plugin installed in this environment."""
    entries: dict[tuple[str, str, str], tuple[EntryPoint, str]] = {}
    for distribution in distributions():
        for entry in distribution.entry_points:
            if entry.group == GROUP:
                name = distribution.metadata["Name"]
                entries.setdefault((name, entry.name, entry.value), (entry, distribution.version))
    return collect((entry, key[0], version) for key, (entry, version) in sorted(entries.items()))


def collect(entries: Iterable[tuple[EntryPoint, str, str]]) -> Catalog:
    """The catalog of (entry point, distribution, version) triples."""
    components: list[Component] = []
    broken: list[Broken] = []
    for entry, distribution, version in entries:
        try:
            found = _components(entry, distribution, version)
        except Exception as error:  # a plugin may fail in any way; it must not harm the others
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            broken.append(Broken(entry.name, distribution, version, reason))
        else:
            components.extend(found)
    return Catalog(tuple(components), tuple(broken))


def _components(entry: EntryPoint, distribution: str, version: str) -> list[Component]:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    manager.register(entry.load(), name=entry.name)
    manager.check_pending()
    found: list[Component] = []
    for kind, hook in KINDS.items():
        for providers in getattr(manager.hook, hook)():
            for provider in providers:
                if not isinstance(provider, Provider):
                    raise TypeError(f"{hook}() yielded {provider!r}, not a Provider")
                if not (
                    isinstance(provider.options, type) and issubclass(provider.options, Options)
                ):
                    raise TypeError(
                        f"{hook}(): options of {provider.name!r} are no class of Options"
                    )
                if any(item.kind == kind and item.name == provider.name for item in found):
                    raise ValueError(f"{hook}() yielded {provider.name!r} twice")
                found.append(Component(kind, provider, distribution, version))
    if not found:
        raise ValueError("it implements no unigrpo hook (are they marked with @hookimpl?)")
    return found
