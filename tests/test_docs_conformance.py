"""The documentation of the conformance kit is true, and the plugins that the pages show conform."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from kit_faults import distribution, passes, pytest_of, subject
from test_docs import ROOT, load_plugins, marked

from unigrpo_core import testing
from unigrpo_core.testing.base import Conformance, LightConformance, installed
from unigrpo_core.testing.policies import PolicyConformance
from unigrpo_core.testing.regularizers import RegularizerConformance

PAGE = ROOT / "docs" / "reference" / "conformance.md"
SHARED = {
    "Of every component": Conformance,
    "Of schedulers, windows, guidance and image objectives": LightConformance,
    "Of both kinds of regularizer": RegularizerConformance,
    "Of every policy": PolicyConformance,
}


def block(language: str, mark: str) -> str:
    [found] = [b.text for b in marked(language, mark) if b.page == PAGE]
    return found


def test_the_example_gives_what_is_shown(tmp_path, monkeypatch):
    distribution(tmp_path, "sharpness", block("python", "plugin"))
    (tmp_path / "test_sharpness.py").write_text(block("python", "conformance"))
    monkeypatch.syspath_prepend(tmp_path)
    installed.cache_clear()
    _, found = pytest_of(tmp_path)
    installed.cache_clear()
    counts = Counter(outcome for outcome, _ in found.values())
    said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    assert f"{said}\n" == block("text", "conformance"), found


def test_every_check_is_described():
    sections = re.split(r"^### (.*)\n", PAGE.read_text(), flags=re.MULTILINE)
    page = dict(zip(sections[1::2], sections[2::2], strict=True))
    kits = {**SHARED, **{f"`{name}`": getattr(testing, name) for name in testing.__all__}}
    assert set(page) == set(kits)
    for title, kit in kits.items():
        rows = dict(re.findall(r"^\| `(test_\w+)` \| (.*) \|$", page[title], re.MULTILINE))
        assert rows == {
            name: " ".join(check.__doc__.replace("``", "`").split())
            for name, check in vars(kit).items()
            if name.startswith("test_")
        }, title


PAGES = sorted({block.page for block in marked("python", "plugin")})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_plugins_of_the_pages_conform(page, tmp_path, monkeypatch):
    kits = {
        "reward": testing.RewardConformance,
        "regularizer": testing.FlowRegularizerConformance,
        "text_objective": testing.TextObjectiveConformance,
    }
    for item in load_plugins(page, tmp_path, monkeypatch).components:
        passed = passes(subject(kits[item.kind], item.provider), tmp_path)
        assert len(passed) > 15, passed
