"""Finds plugins through their entry points, each in isolation, and resolves names.

A broken plugin is listed with its distribution, version and reason, and harms only a recipe that
names something of it. Two plugins with one name make the bare name ambiguous, which matters only
when it is used; ``distribution:name`` is always exact.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import Distribution, EntryPoint, distributions
from pathlib import Path

from unigrpo_core.errors import PluginError, did_you_mean, shown
from unigrpo_core.loading import LoadError, PluginFile, options_fault, providers
from unigrpo_core.plugin import Provider

GROUP = "unigrpo"
DISABLE = "UNIGRPO_DISABLE_PLUGINS"
"""The environment variable that names distributions, by commas, that are not even imported."""

NO_VERSION = "-"
UNNAMED = "(unnamed"


@dataclass(frozen=True)
class Component:
    """A provider with where it comes from; of a plugin file ``distribution`` is its path."""

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

    @property
    def exact(self) -> str:
        """What a recipe says to mean this one, whatever else has its name."""
        return f"{Path(self.distribution).name}:{self.name}"


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
class Disabled:
    """A distribution whose plugins are not there, and what says so."""

    distribution: str
    version: str
    by: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}, by {self.by}"


@dataclass(frozen=True)
class Catalog:
    """What is there for recipes: of distributions, and of ``file``, the plugin file if any.
    ``warnings`` are for the user to read."""

    components: tuple[Component, ...]
    broken: tuple[Broken, ...] = field(default=())
    disabled: tuple[Disabled, ...] = field(default=())
    warnings: tuple[str, ...] = field(default=())
    file: PluginFile | None = None

    def of(self, kind: str) -> tuple[Component, ...]:
        return tuple(item for item in self.components if item.kind == kind)

    def find(self, kind: str, name: str) -> Component:
        """The component of that kind called ``name`` or ``distribution:name``.

        Raises:
            PluginError: there is none (the message names near misses, broken and disabled
                plugins), or several share the bare name.
        """
        distribution, _, bare = name.rpartition(":")
        known = self.of(kind)
        matches = [
            item
            for item in known
            if item.name == bare and (not distribution or _is_of(item, distribution))
        ]
        if len(matches) == 1:
            return matches[0]
        label = kind.replace("_", " ")
        if matches:
            exact = " or ".join(f'"{item.exact}"' for item in matches)
            raise PluginError(f"several plugins have a {label} called {name!r}; say {exact}")
        names = sorted({item.name for item in known})
        hint = did_you_mean(bare, names)
        absent = [f"\n  broken: {item}" for item in self.broken]
        absent += [f"\n  disabled: {item}" for item in self.disabled]
        raise PluginError(f"no {label} called {name!r}{hint}{''.join(absent)}")

    def proved(self) -> Catalog:
        """The catalog for a listing: a component whose options no recipe could state is broken."""
        faults = [(item, options_fault(item.provider)) for item in self.components]
        return replace(
            self,
            components=tuple(item for item, fault in faults if not fault),
            broken=self.broken
            + tuple(
                Broken(item.name, item.distribution, item.version, fault)
                for item, fault in faults
                if fault
            ),
        )

    def installed(self) -> Mapping[str, tuple[str, str]]:
        """Name and version of every distribution with plugins, by normal name, working or not."""
        found = [
            (item.distribution, item.version)
            for items in (self.components, self.broken, self.disabled)
            for item in items
        ]
        file = self.file and shown(self.file.path)
        return {normal(origin[0]): origin for origin in found if origin[0] != file}

    def without(self, distribution: str, by: str) -> Catalog:
        """The catalog with an installed distribution disabled; ``by`` says what disables it."""
        gone = normal(distribution)
        name, version = self.installed()[gone]
        already = any(normal(item.distribution) == gone for item in self.disabled)
        return replace(
            self,
            components=tuple(i for i in self.components if normal(i.distribution) != gone),
            broken=tuple(i for i in self.broken if normal(i.distribution) != gone),
            disabled=self.disabled if already else (*self.disabled, Disabled(name, version, by)),
        )

    def with_file(self, path: Path) -> Catalog:
        """The catalog with the components of a plugin file, given by its absolute path.

        Raises:
            PluginError: it cannot be read.
        """
        try:
            file = PluginFile(path, path.read_bytes())
        except OSError as error:
            raise PluginError(f"{path} cannot be read: {error.strerror or error}") from error
        found = _isolated([(file.load, path.stem, shown(path), NO_VERSION)])
        return replace(
            self,
            components=self.components + found.components,
            broken=self.broken + found.broken,
            file=file,
        )


def normal(name: str) -> str:
    """The name of a distribution as names are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_of(item: Component, distribution: str) -> bool:
    names = (item.distribution, Path(item.distribution).name)
    return normal(distribution) in map(normal, names)


def load_catalog() -> Catalog:
    """Loads every plugin installed in this environment, save those of distributions that the
    environment variable ``UNIGRPO_DISABLE_PLUGINS`` names; the first of a name on the path counts,
    as for imports."""
    named = {normal(word.strip()): word.strip() for word in os.environ.get(DISABLE, "").split(",")}
    entries: dict[tuple[str, str], list[EntryPoint]] = {}
    broken: list[Broken] = []
    disabled: list[Disabled] = []
    seen: set[str] = set()
    for distribution in distributions():
        own, twice = _entries(distribution)
        if not own:
            continue
        name, version, missing = _identity(distribution)
        fault = missing or twice
        if normal(name) in seen and not name.startswith(UNNAMED):
            continue
        seen.add(normal(name))
        if normal(name) in named:
            disabled.append(Disabled(name, version, DISABLE))
        elif fault:
            broken += [Broken(entry, name, version, fault) for entry in own]
        else:
            entries[name, version] = list(own.values())
    usable = collect((entry, *origin) for origin in sorted(entries) for entry in entries[origin])
    catalog = Catalog(
        usable.components, (*usable.broken, *broken), tuple(sorted(disabled, key=str))
    )
    known = [name for name, _ in catalog.installed().values()]
    return replace(
        catalog,
        warnings=tuple(
            f"{DISABLE} names {word!r}, which is no installed distribution of plugins"
            f"{did_you_mean(word, known)}"
            for key, word in named.items()
            if word and key not in seen
        ),
    )


def _entries(distribution: Distribution) -> tuple[dict[str, EntryPoint], str]:
    """The plugins of a distribution by name, and what is wrong with the names ("")."""
    own = [entry for entry in distribution.entry_points if entry.group == GROUP]
    twice = sorted({entry.name for entry in own if sum(e.name == entry.name for e in own) > 1})
    fault = f"it has several entry points called {', '.join(twice)}" if twice else ""
    return {entry.name: entry for entry in sorted(own, key=lambda entry: entry.name)}, fault


def _identity(distribution: Distribution) -> tuple[str, str, str]:
    """Name and version of a distribution, and what of it is missing ("")."""
    stated = []
    for key in ("Name", "Version"):
        try:
            stated.append(distribution.metadata[key] or "")
        except Exception:  # newer Pythons raise, and there may be no metadata at all
            stated.append("")
    name, version = stated
    missing = " and no ".join(filter(None, ("" if name else "Name", "" if version else "Version")))
    return (
        name or f"{UNNAMED}, in {distribution.locate_file('')})",
        version or NO_VERSION,
        missing and f"its metadata has no {missing}",
    )


def collect(entries: Iterable[tuple[EntryPoint, str, str]]) -> Catalog:
    """The catalog of (entry point, distribution, version) triples."""
    return _isolated(
        (entry.load, entry.name, distribution, version) for entry, distribution, version in entries
    )


def _isolated(plugins: Iterable[tuple[Callable[[], object], str, str, str]]) -> Catalog:
    """The catalog of (what loads a plugin, its name, distribution, version)."""
    components: list[Component] = []
    broken: list[Broken] = []
    for load, name, distribution, version in plugins:
        try:
            found = providers(load, name)
        except LoadError as error:
            broken.append(Broken(name, distribution, version, str(error)))
        else:
            components.extend(Component(*item, distribution, version) for item in found)
    return Catalog(tuple(components), tuple(broken))
