"""Loads one plugin in isolation and checks all that it yields, so that a fault of it is known
before a recipe needs it, by its reason."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.abc import SourceLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import Any

import pluggy

from unigrpo_core.errors import shown
from unigrpo_core.plugin import KINDS, PROJECT, Hooks, Options, Provider

PLUGIN_FILE = "unigrpo_plugins.py"
"""The name of a plugin file: a plugin beside a recipe, without a distribution."""

READABLE = frozenset({"prompt", "metadata", "thought", "image"})
"""What a reward may read of an episode."""

Yielded = tuple[str, Provider]


class LoadError(Exception):
    """A plugin that cannot be used; the message is the reason, on one line."""


def providers(load: Callable[[], object], name: str) -> list[Yielded]:
    """(kind, provider) of all that the plugin that ``load`` returns yields, checked. What the
    plugin prints meanwhile goes to stderr.

    Raises:
        LoadError: whatever goes wrong in it, an exit of the interpreter included.
    """
    try:
        with redirect_stdout(sys.stderr):
            return list(_yielded(load(), name))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may fail in any way; it must not harm the others
        raise LoadError(said(error)) from error


def said(error: BaseException) -> str:
    """The error on one line; before it file and line, if it came from a plugin file."""
    text = " ".join(str(error).split())
    if not isinstance(error, LoadError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    places = [(f.f_code.co_filename, line) for f, line in walk_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        places.append((error.filename, error.lineno or 1))
    for file, line in reversed(places):
        if Path(file).name == PLUGIN_FILE:
            return f"{shown(Path(file))}:{line}: {text}"
    return text


# --- what a plugin yields ---------------------------------------------------------------------


def _yielded(plugin: object, name: str) -> Iterator[Yielded]:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    _check_hooks(plugin, manager)
    manager.register(plugin, name=name)
    count, found = 0, set()
    for kind, hook in KINDS.items():
        for implementation in getattr(manager.hook, hook).get_hookimpls():
            count += 1
            fault = partial(_fault, implementation.function)
            for provider in _called(hook, implementation.function):
                _check(provider, hook, fault)
                if (kind, provider.name) in found:
                    raise fault(f"{hook}() yielded {provider.name!r} twice")
                found.add((kind, provider.name))
                yield kind, provider
    if not count:
        raise LoadError("it implements no unigrpo hook (are they marked with @hookimpl?)")
    if not found:
        raise LoadError("its hooks yield no provider")


def _check_hooks(plugin: object, manager: pluggy.PluginManager) -> None:
    """Says what pluggy would say in other words, or not at all."""
    for name in dir(plugin):
        marks = manager.parse_hookimpl_opts(plugin, name)
        function = getattr(plugin, name, None)
        if not inspect.isroutine(function) or (marks is None and name not in KINDS.values()):
            continue
        if marks is None:
            raise _fault(function, f"{name}() is not marked with unigrpo_core.plugin.hookimpl")
        hook = marks["specname"] or name
        if hook not in KINDS.values() and not marks["optionalhook"]:
            known = ", ".join(KINDS.values())
            raise _fault(function, f"no hook is called {hook!r}; there are: {known}")
        if inspect.signature(function).parameters:
            raise _fault(function, f"{name}{inspect.signature(function)} should take no argument")


def _called(hook: str, function: Callable[[], Any]) -> Iterator[Any]:
    yielded = function()
    try:
        return iter(yielded)
    except TypeError:
        message = f"{hook}() returned {yielded!r}, and should yield Providers"
        raise _fault(function, message) from None


def _check(provider: Any, hook: str, fault: Callable[[str], LoadError]) -> None:
    if not isinstance(provider, Provider):
        raise fault(f"{hook}() yielded {provider!r}, not a Provider")
    name, options = provider.name, provider.options
    if not (isinstance(name, str) and re.fullmatch(r"[^\s:]+", name)):
        raise fault(f"{hook}() yielded the name {name!r}, not a word without colons and blanks")
    if not callable(provider.build):
        raise fault(f"{hook}(): build of {name!r} is {provider.build!r}, no function")
    if not (isinstance(options, type) and issubclass(options, Options)):
        raise fault(f"{hook}(): options of {name!r} are no class of Options")
    for field in ("needs", "provides", "reads"):
        words = getattr(provider, field)
        if isinstance(words, str) or not all(isinstance(word, str) for word in words):
            raise fault(f"{hook}(): {field} of {name!r} is {words!r}, no sequence of words")
    unknown = ", ".join(sorted(set(provider.reads) - READABLE))
    if unknown:
        known = ", ".join(sorted(READABLE))
        raise fault(f"{hook}(): {name!r} reads {unknown}, and an episode has {known}")
    if provider.range is not None and not _is_range(provider.range):
        raise fault(f"{hook}(): range of {name!r} is {provider.range!r}, not (lowest, highest)")


def options_fault(provider: Provider) -> str:
    """Why no options of this class can be made ("" if they can). They are built only when first
    used, since building all takes longer than most commands."""
    try:
        provider.options.model_rebuild(raise_errors=True)
    except Exception as error:
        return f"options of {provider.name!r} are no valid class: {said(error)}"
    return ""


def _is_range(value: Any) -> bool:
    numbers = isinstance(value, tuple | list) and all(isinstance(end, int | float) for end in value)
    return numbers and len(value) == 2 and value[0] < value[1]


def _fault(function: Callable[..., Any], message: str) -> LoadError:
    """A fault of what stands in the function; of a plugin file, with its line."""
    code = getattr(function, "__code__", None)
    if code is not None and Path(code.co_filename).name == PLUGIN_FILE:
        return LoadError(f"{shown(Path(code.co_filename))}:{code.co_firstlineno}: {message}")
    return LoadError(message)


def file_of(provider: Provider) -> str:
    """The file that ``build`` is written in ("" where that cannot be told)."""
    build = inspect.unwrap(provider.build)
    code = getattr(build, "__code__", None)
    if code is not None:
        return str(code.co_filename)
    module = sys.modules.get(getattr(build, "__module__", ""))
    return str(getattr(module, "__file__", None) or "")


# --- plugin files -----------------------------------------------------------------------------


@dataclass(frozen=True)
class PluginFile:
    """A plugin file as it was read."""

    path: Path
    source: bytes

    @property
    def sha256(self) -> str:
        return sha256(self.source).hexdigest()

    def load(self) -> ModuleType:
        """Runs exactly what was read, as a module of a name of its own."""
        name = f"unigrpo_plugins_{sha256(str(self.path).encode()).hexdigest()[:12]}"
        spec = spec_from_loader(name, _Read(self), origin=str(self.path))
        assert spec is not None
        assert spec.loader is not None
        spec.has_location = True
        module = module_from_spec(spec)
        sys.modules[name] = module  # where annotations are looked up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module


class _Read(SourceLoader):
    """Loads the bytes of a plugin file; without a cache, whose key is a time in seconds."""

    def __init__(self, file: PluginFile) -> None:
        self.file = file

    def get_filename(self, fullname: str) -> str:
        return str(self.file.path)

    def get_data(self, path: bytes | str) -> bytes:
        if path != str(self.file.path):
            raise OSError(f"{path!r} is not the plugin file")
        return self.file.source
