"""Components that break one promise each, and what the conformance kit says of them."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from unigrpo_core.plugin import Provider
from unigrpo_core.testing.base import Conformance


def provider(build: Callable[..., Any], **facts: Any) -> Provider:
    return Provider(**{"name": "faulty", "build": build, "summary": "a fault", **facts})


@dataclass(frozen=True)
class Fault:
    """A component that breaks the promise of one check, and a pattern of what the check says."""

    kit: type[Conformance]
    check: str
    says: str
    provider: Provider
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kit.__name__}-{self.check}"


class Faults:
    """The faults of a kind, each a change of a good component.

    Called with the name of a check, what it says, and either members that replace those of the good
    component's class or a ``build`` of its own. ``facts`` are the provider's.
    """

    def __init__(self, kit: type[Conformance], good: Callable[[], Any], **facts: Any) -> None:
        self.kit, self.good, self.facts = kit, good, facts
        self.found: list[Fault] = []

    def __call__(
        self,
        check: str,
        says: str,
        build: Callable[[], Any] | None = None,
        facts: Mapping[str, Any] | None = None,
        **members: Any,
    ) -> None:
        faulty = build or self.good
        if members:
            assert isinstance(self.good, type)
            faulty = type("Faulty", (self.good,), members)
        given = self.facts if facts is None else facts
        self.found.append(Fault(self.kit, check, says, provider(lambda options: faulty(), **given)))

    @property
    def right(self) -> Provider:
        """The provider of the good component."""
        return provider(lambda options: self.good(), **self.facts)


def drawing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, after a draw from a global generator."""

    def drawn(*arguments: Any) -> Any:
        random.random()
        return function(*arguments)

    return drawn


def unsteady(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, times a factor that rises with every call."""
    calls = Counted()
    return lambda *arguments: function(*arguments) * (1 + calls() / 1000)


class Counted:
    """Numbers that rise with every call: 1, 2, ..."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        return self.calls


def checks(kit: type[Conformance]) -> list[str]:
    return [name for name in dir(kit) if name.startswith("test_")]


def subject(kit: type[Conformance], given: Provider, **facts: Any) -> Conformance:
    """A conformance class for a provider, as an author would write it."""
    made: Conformance = type("Subject", (kit,), {"provider": given, **facts})()
    return made


def run_check(kit: Conformance, check: str, tmp_path: Path) -> None:
    """Calls a check as pytest would."""
    method = getattr(kit, check)
    wanted = inspect.signature(method).parameters
    given: dict[str, Any] = {"given": kit.options, "tmp_path": tmp_path}
    if "component" in wanted:
        given["component"] = kit.build(kit.options)
    method(**{name: given[name] for name in wanted})


def passes(kit: Conformance, tmp_path: Path) -> list[str]:
    """Runs every check; those that were not skipped."""
    passed = []
    for check in checks(type(kit)):
        try:
            run_check(kit, check, tmp_path)
            passed.append(check)
        except pytest.skip.Exception:
            pass
    return passed


def catch(fault: Fault, tmp_path: Path, **facts: Any) -> None:
    """Asserts that the fault's check fails, and for that reason."""
    kit = subject(fault.kit, fault.provider, **{"options": fault.options, **facts})
    with pytest.raises((AssertionError, pytest.fail.Exception), match=f"(?s){fault.says}"):
        run_check(kit, fault.check, tmp_path)


def distribution(folder: Path, name: str, code: str) -> None:
    """Puts a module into a folder as an installed distribution would: with an entry point."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-0.1.dist-info"
    info.mkdir()
    wheel = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0.1\n"
    (info / "METADATA").write_text(wheel)
    (info / "entry_points.txt").write_text(f"[unigrpo]\n{name} = {name}\n")


class Reports:
    """What pytest reports of the tests that it calls: (outcome, words), by name."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
            words = getattr(report, "wasxfail", "") or report.longreprtext
            self.found[report.nodeid.partition("::")[2]] = (outcome, words)


def pytest_of(folder: Path, *words: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Runs the tests in a folder within this process; its exit code and reports."""
    reports = Reports()
    quiet = ("-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:benchmark")
    code = pytest.main([str(folder), "--rootdir", str(folder), *quiet, *words], plugins=[reports])
    return int(code), reports.found
