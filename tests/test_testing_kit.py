"""The conformance kit: every check catches a fault, what is right passes, and pytest selects checks
and expects failures."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires

import pytest
from kit_faults import any_kind, catch, checks, distribution, passes, pytest_of, run_check, subject
from kit_faults.advantages import advantage
from kit_faults.guidance import guidance
from kit_faults.image_objectives import image
from kit_faults.prompts import source
from kit_faults.regularizers import flow, token
from kit_faults.rewards import reward
from kit_faults.schedulers import scheduler
from kit_faults.text_objectives import text
from kit_faults.windows import window

from unigrpo_core import testing
from unigrpo_core.testing import light
from unigrpo_core.testing.base import Conformance, LightConformance, installed

KINDS = (reward, flow, token, scheduler, window, guidance, text, image, advantage, source)
FAULTS = [*any_kind.found, *(fault for kind in KINDS for fault in kind.found)]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_caught(fault, tmp_path):
    catch(fault, tmp_path)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kit.__name__)
def test_what_is_right_passes(kind, tmp_path):
    passed = passes(subject(kind.kit, kind.right), tmp_path)
    assert len(passed) >= len(checks(kind.kit)) - 3, passed


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kit.__name__)
def test_every_check_has_a_fault_that_it_catches(kind):
    caught = {getattr(fault.kit, fault.check) for fault in FAULTS}
    caught |= {Conformance.test_listing_stays_light, LightConformance.test_building_stays_light}
    assert [name for name in checks(kind.kit) if getattr(kind.kit, name) not in caught] == []


def test_every_kind_is_exported():
    kits = {kind.kit for kind in KINDS} | {
        testing.TextPolicyConformance,
        testing.ImageFlowPolicyConformance,
    }
    assert kits == {getattr(testing, name) for name in testing.__all__}


def test_without_pytest_it_says_what_to_install():
    """pytest is no requirement of unigrpo, so the kit may be imported without."""
    runtime = [line for line in requires("unigrpo") if "extra ==" not in line]
    assert not any(line.startswith("pytest") for line in runtime)
    code = "import sys; sys.modules['pytest'] = None; import unigrpo_core.testing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "needs pytest, which is not installed: pip install pytest" in done.stderr


# --- found through entry points ---------------------------------------------------------------

WINDOW = """\
from unigrpo_core.interfaces import Window
from unigrpo_core.plugin import Options, Provider, hookimpl

class All(Window):
    def count(self, total):
        if total < 1:
            raise ValueError("no step")
        return total

    def steps(self, total, key, rollout):
        return tuple(range(self.count(total)))

def build(options):
    {inside}
    return All()

@hookimpl
def unigrpo_windows():
    yield Provider(name="all_steps", build=build, summary="every step")
"""


@pytest.mark.parametrize(
    ("name", "first", "inside", "importing", "building"),
    [
        ("light_plugin", "", "import json", False, False),
        ("heavy_import", "import weighty\n", "", True, True),
        ("heavy_build", "", "import weighty", False, True),
    ],
)
def test_what_is_heavy(tmp_path, monkeypatch, name, first, inside, importing, building):
    assert light.HEAVY[0] == "torch"
    monkeypatch.setattr(light, "HEAVY", ("weighty",))  # as torch, which takes seconds to import
    (tmp_path / "weighty.py").touch()
    distribution(tmp_path, name, first + WINDOW.format(inside=inside or "pass"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(testing.WindowConformance, "use", f"{name.replace('_', '-')}:all_steps")
    installed.cache_clear()
    kit = testing.WindowConformance()
    for check, heavy in (
        ("test_listing_stays_light", importing),
        ("test_building_stays_light", building),
    ):
        if heavy:
            with pytest.raises(AssertionError, match="imports weighty; do it inside"):
                run_check(kit, check, tmp_path)
        else:
            run_check(kit, check, tmp_path)
    run_check(kit, "test_steps_rise_and_exist", tmp_path)
    installed.cache_clear()


# --- what a subclass states -------------------------------------------------------------------


def test_an_expected_failure_names_a_check_and_a_reason():
    with pytest.raises(TypeError, match="did you mean 'test_scores_are_in_range'"):
        subject(testing.RewardConformance, None, expected_failures={"test_scores_are_in_rage": "x"})
    with pytest.raises(TypeError, match="'test_declarations' needs a reason"):
        subject(testing.RewardConformance, None, expected_failures={"test_declarations": " "})


def test_a_class_names_its_component():
    with pytest.raises(TypeError, match="Subject must state use or provider"):
        subject(testing.WindowConformance, None).found()


AUTHORS_TESTS = """\
from kit_faults import Faults
from kit_faults.windows import GoodWindow, window
from unigrpo_core.testing import WindowConformance

class TestGood(WindowConformance):
    provider = window.right

class TestExpected(TestGood):
    provider = next(f for f in window.found if "expected a tuple" in f.says).provider
    expected_failures = {"test_steps_rise_and_exist": "it gives lists"}

class TestMended(TestGood):
    expected_failures = {"test_steps_rise_and_exist": "it gave lists"}

class TestFaulty(TestGood):
    provider = TestExpected.provider
"""


def test_pytest_runs_selects_and_expects(tmp_path):
    (tmp_path / "test_authors.py").write_text(AUTHORS_TESTS)
    code, found = pytest_of(tmp_path, "-k", "rise_and_exist or the_key_decides")
    assert code == pytest.ExitCode.TESTS_FAILED
    assert len(found) == 8
    expected = {
        "TestGood": ("passed", ""),
        "TestExpected": ("xfailed", "it gives lists"),
        "TestMended": ("failed", "[XPASS(strict)] it gave lists"),
        "TestFaulty": ("failed", "list, expected a tuple"),
    }
    for name, (outcome, words) in expected.items():
        assert found[f"{name}::test_the_key_decides"][0] == "passed"
        got = found[f"{name}::test_steps_rise_and_exist"]
        assert got[0] == outcome
        assert words in got[1]
