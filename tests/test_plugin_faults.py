"""Every way a plugin can be broken: listed with its reason, and fatal only to who names it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from unigrpo_core import cli
from unigrpo_core.catalog import DISABLE, load_catalog
from unigrpo_core.errors import PluginError
from unigrpo_core.plugin import KINDS

HEAD = """\
import pluggy
from unigrpo_core.plugin import Field, Options, Provider, hookimpl
build = lambda options: lambda batch: batch
"""
GOOD = "@hookimpl\ndef unigrpo_rewards():\n    yield Provider('mine', build, range=(0.0, 1.0))\n"


def yields(words):
    return HEAD + GOOD.partition("yield")[0] + f"yield {words}\n"


FAULTS = {
    "import": ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
    "syntax": ("def f(:\n", "SyntaxError: invalid syntax (faulty.py, line 1)"),
    "exit": ("import sys\nsys.exit(3)", "SystemExit: 3"),
    "hook name": (
        HEAD + GOOD.replace("unigrpo_rewards", "unigrpo_reward"),
        f"no hook is called 'unigrpo_reward'; there are: {', '.join(KINDS.values())}",
    ),
    "hook arguments": (
        HEAD + GOOD.replace("rewards()", "rewards(options)"),
        "unigrpo_rewards(options) should take no argument",
    ),
    "hook raises": (
        HEAD + GOOD.replace("yield", "1 / 0\n    yield"),
        "ZeroDivisionError: division by zero",
    ),
    "hook exits": (HEAD + GOOD.replace("yield", "raise SystemExit\n    yield"), "SystemExit"),
    "no provider": (yields("'mine'"), "unigrpo_rewards() yielded 'mine', not a Provider"),
    "returns": (
        HEAD + GOOD.replace("yield Provider", "Provider"),
        "unigrpo_rewards() returned None, and should yield Providers",
    ),
    "nothing": (HEAD + GOOD.replace("yield", "return\n    yield"), "its hooks yield no provider"),
    "twice": (HEAD + GOOD + "    yield Provider('mine', build)", "unigrpo_rewards() yielded 'mine'"
              " twice"),
    "options": (
        yields("Provider('mine', build, dict)"),
        "unigrpo_rewards(): options of 'mine' are no class of Options",
    ),
    "no hook": (HEAD, "it implements no unigrpo hook (are they marked with @hookimpl?)"),
    "another marker": (
        HEAD + "other = pluggy.HookimplMarker('other')\n" + GOOD.replace("@hookimpl", "@other"),
        "unigrpo_rewards() is not marked with unigrpo_core.plugin.hookimpl",
    ),
    "one unmarked": (
        HEAD + GOOD + GOOD.replace("@hookimpl\n", "").replace("rewards", "prompts"),
        "unigrpo_prompts() is not marked with unigrpo_core.plugin.hookimpl",
    ),
    "build": (yields("Provider('mine', 3)"), "unigrpo_rewards(): build of 'mine' is 3, no func"),
    "empty name": (yields("Provider('', build)"), "unigrpo_rewards() yielded the name ''"),
    "colon": (yields("Provider('a:b', build)"), "unigrpo_rewards() yielded the name 'a:b', not a"),
    "blank": (yields("Provider('a b', build)"), "unigrpo_rewards() yielded the name 'a b', not a"),
    "needs": (
        yields("Provider('mine', build, needs='std')"),
        "unigrpo_rewards(): needs of 'mine' is 'std', no sequence of words",
    ),
    "reads": (
        yields("Provider('mine', build, reads=('images', 'thought'))"),
        "unigrpo_rewards(): 'mine' reads images, and an episode has image, metadata,",
    ),
    "range": (
        yields("Provider('mine', build, range=(1.0, 0.0))"),
        "unigrpo_rewards(): range of 'mine' is (1.0, 0.0), not (lowest, highest)",
    ),
    "no range": (
        yields("Provider('mine', build, range=1.0)"),
        "unigrpo_rewards(): range of 'mine' is 1.0, not (lowest, highest)",
    ),
    "no text": (yields("Provider(3, build)"), "unigrpo_rewards() yielded the name 3, not a word"),
}  # fmt: skip


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Puts a distribution on the path whose entry point names a module of that source."""
    monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def distribution(source, metadata="Name: Fau_lty\nVersion: 0.3\n", entry="faulty"):
        folder = tmp_path / "packages"
        about = folder / "fau_lty-0.3.dist-info"
        about.mkdir(parents=True)
        (folder / "faulty.py").write_text(source)
        (about / "entry_points.txt").write_text(f"[unigrpo]\none = {entry}\n")
        if metadata is not None:
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\n{metadata}")
        monkeypatch.syspath_prepend(folder)
        return folder

    return distribution


NO_OPTIONS = {
    "field": (
        HEAD
        + "class Mine(Options):\n    x: pluggy.PluginManager\n"
        + GOOD.replace("build,", "build, Mine,"),
        "options of 'mine' are no valid class: PydanticSchemaGenerationError: "
        "Unable to generate pydantic-core schema for",
    ),
    "annotation": (
        HEAD + "class Mine(Options):\n    x: 'Nowhere'\n" + GOOD.replace("build,", "build, Mine,"),
        "options of 'mine' are no valid class: PydanticUndefinedAnnotation",
    ),
}


@pytest.fixture
def unigrpo(capsys):
    def run(*argv):
        code = cli.main(argv)
        return code, *capsys.readouterr()

    return run


def listed(unigrpo):
    code, out, _ = unigrpo("plugins", "--json")
    found = json.loads(out)
    assert code == 0
    assert {item["distribution"] for item in found["components"]} == {"unigrpo"}
    return found["broken"]


def test_the_plugin_that_the_faults_are_made_of_works(distribution):
    distribution(HEAD + GOOD)
    catalog = load_catalog()
    assert catalog.broken == ()
    assert catalog.find("reward", "mine").origin == "Fau_lty 0.3"
    assert catalog.find("reward", "fau-lty:mine") is catalog.find("reward", "mine")


@pytest.mark.parametrize(
    "source",
    [
        GOOD.replace("unigrpo_rewards", "mine").replace("impl", "impl(specname='unigrpo_rewards')"),
        GOOD + "@hookimpl(optionalhook=True)\ndef unigrpo_of_a_later_version(): ...\n",
    ],
)
def test_what_pluggy_allows_is_no_fault(distribution, source):
    distribution(HEAD + source)
    catalog = load_catalog()
    assert catalog.broken == ()
    assert catalog.find("reward", "mine").distribution == "Fau_lty"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_listed_and_harms_only_who_names_it(distribution, unigrpo, fault):
    source, reason = FAULTS[fault]
    distribution(source)
    [broken] = listed(unigrpo)
    assert broken["reason"].startswith(reason)
    assert "\n" not in broken["reason"]
    assert (broken["entry"], broken["distribution"], broken["version"]) == ("one", "Fau_lty", "0.3")
    assert unigrpo("check", "no_cfg_mse")[0] == 0
    code, out, _ = unigrpo("check", "no_cfg_mse", "--set", "rewards=[{use='mine'}]")
    assert code == 3
    assert f"broken: plugin 'one' of Fau_lty 0.3: {broken['reason']}" in out


@pytest.mark.parametrize("fault", NO_OPTIONS)
def test_options_that_cannot_be_stated_are_listed_and_harm_only_who_names_them(
    distribution, unigrpo, fault
):
    source, reason = NO_OPTIONS[fault]
    distribution(source)
    [broken] = listed(unigrpo)
    assert broken["reason"].startswith(reason)
    assert "\n" not in broken["reason"]
    assert (broken["entry"], broken["distribution"]) == ("mine", "Fau_lty")
    assert unigrpo("check", "no_cfg_mse")[0] == 0
    code, out, _ = unigrpo("check", "no_cfg_mse", "--set", "rewards=[{use='mine'}]")
    assert code == 3
    assert "'mine' of Fau_lty 0.3 cannot check its options: Pydantic" in out


@pytest.mark.parametrize(
    ("metadata", "shown", "version", "missing"),
    [
        ("Version: 0.3\n", "(unnamed, in {})", "0.3", "Name"),
        ("Name: Fau_lty\n", "Fau_lty", "-", "Version"),
        ("", "(unnamed, in {})", "-", "Name and no Version"),
        (None, "(unnamed, in {})", "-", "Name and no Version"),
    ],
)
def test_metadata_that_lacks_something(distribution, unigrpo, metadata, shown, version, missing):
    folder = distribution(HEAD + GOOD, metadata)
    assert listed(unigrpo) == [
        {
            "entry": "one",
            "distribution": shown.format(folder),
            "version": version,
            "reason": f"its metadata has no {missing}",
        }
    ]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("faulty:nothing", "AttributeError: module 'faulty' has no attribute 'nothing'"),
        ("faulty\none = pluggy", "it has several entry points called one"),
    ],
)
def test_entry_points_that_lead_nowhere(distribution, unigrpo, entry, reason):
    distribution(HEAD + GOOD, entry=entry)
    assert [item["reason"] for item in listed(unigrpo)] == [reason]


def test_an_interrupt_is_no_fault(distribution, unigrpo):
    distribution("raise KeyboardInterrupt")
    assert unigrpo("plugins") == (130, "", "interrupted\n")


def test_what_a_plugin_prints_is_not_the_output(distribution, unigrpo):
    distribution("print('hello')\n" + HEAD + GOOD.replace("yield", "print('again'); yield"))
    code, out, err = unigrpo("plugins", "reward", "mine", "--json")
    assert (code, err) == (0, "hello\nagain\n")
    assert json.loads(out)["components"][0]["name"] == "mine"


@pytest.mark.parametrize("older", ["Name: Fau_lty\nVersion: 0.3\n", "Name: Fau_lty\n"])
def test_the_first_of_a_name_on_the_path_counts(distribution, tmp_path, monkeypatch, older):
    distribution(HEAD + GOOD, older)
    newer = tmp_path / "newer" / "fau_lty-0.4.dist-info"
    newer.mkdir(parents=True)
    (newer / "entry_points.txt").write_text("[unigrpo]\nanother = faulty\n")
    (newer / "METADATA").write_text("Name: fau-lty\nVersion: 0.4\n")
    monkeypatch.syspath_prepend(newer.parent)
    catalog = load_catalog()
    assert catalog.find("reward", "mine").version == "0.4"
    assert catalog.broken == ()


# --- built ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        ("lambda options: 3", "built 3, not a Reward"),
        ("lambda options: 1 / 0", "cannot be built: ZeroDivisionError: division by zero"),
        ("lambda options: exit(4)", "cannot be built: SystemExit: 4"),
        ("lambda options: print", "is a function, so its provider should say its range, such as"),
    ],
)
def test_a_component_that_is_built_wrongly_names_its_distribution(distribution, build, reason):
    from unigrpo_core.recipe import find_recipe, load_recipe

    distribution(yields(f"Provider('mine', {build})"))
    catalog = load_catalog()
    assert catalog.broken == ()
    resolved = load_recipe(find_recipe("no_cfg_mse"), catalog, ["rewards=[{use='mine'}]"])
    with pytest.raises(PluginError) as caught:
        resolved.recipe.rewards[0].build()
    assert str(caught.value).startswith(f"reward 'mine' of Fau_lty 0.3 {reason}")
    assert caught.value.exit_code == 3


def test_an_interrupt_while_building_is_no_fault(distribution):
    from unigrpo_core.recipe import find_recipe, load_recipe

    distribution(HEAD + "def build(_):\n    raise KeyboardInterrupt\n" + GOOD)
    resolved = load_recipe(find_recipe("no_cfg_mse"), load_catalog(), ["rewards=[{use='mine'}]"])
    with pytest.raises(KeyboardInterrupt):
        resolved.recipe.rewards[0].build()


# --- disabled by the environment --------------------------------------------------------------


def test_the_environment_disables(distribution, unigrpo, monkeypatch):
    distribution(HEAD + GOOD)
    monkeypatch.setenv(DISABLE, " fau-lty, unigrop,,")
    code, out, err = unigrpo("plugins", "--json")
    assert json.loads(out)["disabled"] == [
        {"distribution": "Fau_lty", "version": "0.3", "by": "UNIGRPO_DISABLE_PLUGINS"}
    ]
    assert err == (
        "warning: UNIGRPO_DISABLE_PLUGINS names 'unigrop', which is no installed distribution of "
        "plugins; did you mean 'unigrpo'?\n"
    )
    code, out, _ = unigrpo("check", "no_cfg_mse", "--set", "rewards=[{use='mine'}]")
    assert code == 3
    assert "disabled: Fau_lty 0.3, by UNIGRPO_DISABLE_PLUGINS" in out
    assert unigrpo("plugins")[1].endswith("disabled: Fau_lty 0.3, by UNIGRPO_DISABLE_PLUGINS\n")


def test_a_disabled_plugin_is_not_even_imported(distribution):
    folder = distribution("import os\nos._exit(77)")
    command = [sys.executable, "-m", "unigrpo_core", "plugins"]
    variables = {**os.environ, "PYTHONPATH": str(folder)}
    assert subprocess.run(command, env=variables, capture_output=True).returncode == 77
    variables[DISABLE] = "fau_lty"
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("disabled: Fau_lty 0.3, by UNIGRPO_DISABLE_PLUGINS\n")
