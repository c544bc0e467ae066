"""The table [plugins]: what a recipe requires, and what it does without."""

from dataclasses import asdict, replace

import pytest
from fake_plugin import RECIPE, fake_catalog

from unigrpo_core.catalog import Broken, Catalog
from unigrpo_core.recipe import RecipeError, load_recipe


def catalog() -> Catalog:
    """The fakes of "fakes 1.2", a reward of "The.Extras 0.3.dev1", and one broken plugin."""
    fakes = fake_catalog()
    extra = replace(fakes.find("reward", "exact"), distribution="The.Extras", version="0.3.dev1")
    extra = replace(extra, provider=replace(extra.provider, name="extra"))
    broken = Broken("torn", "torn-paper", "2.0", "ValueError: torn")
    odd = Broken("odd", "odd-version", "first", "ValueError: odd")
    return Catalog((*fakes.components, extra), (broken, odd))


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load(text, *overrides):
        (tmp_path / "a.toml").write_text(f"{RECIPE}\n[plugins]\n{text}")
        return load_recipe("a.toml", catalog(), overrides)

    return load


@pytest.fixture
def mistakes(load):
    def mistakes(text, *overrides):
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        return str(caught.value).split("\n"), caught.value.exit_code

    return mistakes


LINE = RECIPE.count("\n") + 3  # of the first key in [plugins]


def test_what_is_stated_belongs_to_the_recipe(load):
    resolved = load('require = ["fakes>=1, <2", "the_extras"]\ndisable = ["torn-paper"]')
    assert resolved.values["plugins"] == {
        "require": ["fakes>=1, <2", "the_extras"],
        "disable": ["torn-paper"],
    }
    assert resolved.origins["plugins.disable"].line == LINE + 1
    assert resolved.hash != load("").hash
    assert load("").origins["plugins.require"] == "default"


@pytest.mark.parametrize("text", ["fakes", "FAKES==1.2", "the-extras>=0.2", "The_Extras<1"])
def test_what_is_met(load, text):
    assert load(f"require = ['{text}']").recipe.plugins.require == (text,)


@pytest.mark.parametrize(
    ("text", "message", "code"),
    [
        ("fakes>=2", "needs fakes>=2, and fakes 1.2 is installed", 3),
        ("the-extras>=0.3", "needs the-extras>=0.3, and The.Extras 0.3.dev1 is installed", 3),
        (
            "fakess",
            "no distribution of plugins called 'fakess' is installed; did you mean 'fakes'?",
            3,
        ),
        (
            "torch>=2",
            "no distribution of plugins called 'torch' is installed; there are: "
            "The.Extras, fakes, odd-version, torn-paper",
            3,
        ),
        ("torn-paper", "torn-paper 2.0 is broken: plugin 'torn': ValueError: torn", 3),
        (
            "fakes >= one",
            "'fakes >= one' is no requirement such as \"name>=1.0\": Expected",
            2,
        ),
        ("", "'' is no requirement such as \"name>=1.0\": Expected", 2),
        (
            "fakes[all]",
            "'fakes[all]' should be a name and versions only, without extras, URL or marker",
            2,
        ),
        ("fakes; python_version>'3'", "\"fakes; python_version>'3'\" should be a name and", 2),
        ("fakes @ file:///tmp/x", "'fakes @ file:///tmp/x' should be a name and versions only", 2),
    ],
)
def test_what_is_not_met(mistakes, text, message, code):
    [told], found = mistakes(f'require = [\n"fakes", "{text}"]')
    assert told.startswith(f"a.toml:{LINE + 1}: plugins.require.1: {message}")
    assert found == code


def test_a_version_that_cannot_be_compared(load, mistakes, monkeypatch):
    odd = replace(catalog().find("reward", "extra"), distribution="odd", version="first")
    items = Catalog((*fake_catalog().components, odd))
    monkeypatch.setattr("test_recipe_plugin_table.catalog", lambda: items)
    [told], code = mistakes("require = ['odd>=1']")
    assert told.endswith("needs odd>=1, and the version 'first' of odd is not of PEP 440")
    assert code == 3


def test_all_that_is_wrong_is_told_at_once(mistakes):
    told, code = mistakes("require = ['fakes>2', 'moon']\ndisable = ['sun']", "seed=-1")
    assert [line.partition(": ")[0] for line in told] == [
        f"a.toml:{LINE}",
        f"a.toml:{LINE}",
        f"a.toml:{LINE + 1}",
        "--set",
    ]
    assert code == 2


@pytest.mark.parametrize("text", ["require = 'fakes'", "disable = [3]", "requires = []"])
def test_types_are_checked_like_all_others(mistakes, text):
    [told], code = mistakes(text)
    assert told.startswith(f"a.toml:{LINE}: plugins.{text.split()[0]}")
    assert code == 2


def test_what_is_disabled_is_not_there(load, mistakes):
    use = "rewards=[{use='extra'}]"
    assert load("", use).disabled == ()
    told, code = mistakes("disable = ['the_extras']", use)
    assert told[0].startswith("--set: rewards.0.use: no reward called 'extra'")
    assert f"  disabled: The.Extras 0.3.dev1, by a.toml:{LINE}" in told
    assert code == 3
    assert [asdict(item) for item in load("disable = ['the_extras', 'torn-paper']").disabled] == [
        {"distribution": "The.Extras", "version": "0.3.dev1", "by": f"a.toml:{LINE}"},
        {"distribution": "torn-paper", "version": "2.0", "by": f"a.toml:{LINE}"},
    ]


def test_disabling_one_of_two_makes_a_name_plain(load, mistakes, monkeypatch):
    twin = replace(fake_catalog().find("reward", "exact"), distribution="twins")
    items = Catalog((*fake_catalog().components, twin))
    monkeypatch.setattr("test_recipe_plugin_table.catalog", lambda: items)
    assert "several plugins have a reward" in mistakes("")[0][0]
    component = load("disable = ['twins']").recipe.rewards[0].component
    assert component.distribution == "fakes"


def test_disabling_what_is_not_installed(mistakes):
    [told], code = mistakes("disable = ['torn-papers']")
    assert told == (
        f"a.toml:{LINE}: plugins.disable.0: no distribution of plugins called 'torn-papers' is "
        "installed; did you mean 'torn-paper'?"
    )
    assert code == 3


def test_required_and_disabled(mistakes):
    [told], code = mistakes("require = ['torn-paper']\ndisable = ['torn_paper']")
    assert told.endswith(f"torn-paper is required, and disabled by a.toml:{LINE + 1}")
    assert code == 3


def test_disabled_by_the_environment_already(load, monkeypatch):
    items = catalog().without("torn-paper", "UNIGRPO_DISABLE_PLUGINS")
    monkeypatch.setattr("test_recipe_plugin_table.catalog", lambda: items)
    [disabled] = load("disable = ['torn-paper']").disabled
    assert disabled.by == "UNIGRPO_DISABLE_PLUGINS"
