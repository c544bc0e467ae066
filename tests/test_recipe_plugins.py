"""Plugins that misbehave while a recipe is checked: who is at fault is said, by name."""

from dataclasses import replace

import pytest
from fake_plugin import RECIPE, fake_catalog
from pydantic import model_validator

from unigrpo_core.catalog import Catalog
from unigrpo_core.errors import PluginError, UserError
from unigrpo_core.plugin import Field, Options
from unigrpo_core.recipe import RecipeError, load_recipe


@pytest.fixture
def load(tmp_path):
    """Loads the base recipe with the provider of one component changed."""

    def load(kind, name, **changes):
        catalog = fake_catalog()
        old = catalog.find(kind, name)
        new = replace(old, provider=replace(old.provider, **changes))
        (tmp_path / "a.toml").write_text(RECIPE)
        items = tuple(new if item is old else item for item in catalog.components)
        return load_recipe(tmp_path / "a.toml", Catalog(items))

    return load


def fails(error):
    def fail(*_):
        raise error

    return fail


class Shadowing(Options):
    steps: int = Field(1, description="a name the slot has taken")


class Crashing(Options):
    @model_validator(mode="after")
    def _crash(self):
        raise KeyError("oops")


@pytest.mark.parametrize(
    ("kind", "name", "changes", "path", "message"),
    [
        (
            "scheduler",
            "sde",
            {"options": Shadowing},
            "image.scheduler",
            "'sde' of fakes 1.2 has options that are keys of the slot itself: steps",
        ),
        (
            "advantage",
            "group",
            {"options": Crashing},
            "advantage",
            "'group' of fakes 1.2 cannot check its options: KeyError: 'oops'",
        ),
        (
            "guidance",
            "cfg",
            {"build": fails(TypeError("bad build"))},
            "image.guidance",
            "guidance 'cfg' of fakes 1.2 cannot be built: TypeError: bad build",
        ),
        (
            "guidance",
            "cfg",
            {"build": lambda options: "a string"},
            "image.guidance",
            "guidance 'cfg' of fakes 1.2 built 'a string', not a Guidance",
        ),
    ],
)
def test_a_plugin_at_fault(load, kind, name, changes, path, message):
    with pytest.raises(RecipeError) as caught:
        load(kind, name, **changes)
    [problem] = caught.value.problems
    assert (problem.path, problem.message) == (path, message)
    assert caught.value.exit_code == 3


def test_what_a_plugin_tells_the_user_is_passed_on(load):
    with pytest.raises(RecipeError) as caught:
        load("guidance", "cfg", build=fails(UserError("take another scale")))
    assert caught.value.problems[0].message == "take another scale"
    assert caught.value.exit_code == 2


def test_a_window_that_does_not_fit_is_the_recipes_mistake(load):
    assert load("window", "random").recipe.image.window.build().count(8) == 3


def test_building_a_slot_passes_arguments_on_and_names_who_failed(load):
    policy = load("policy", "unified").recipe.policy
    with pytest.raises(PluginError, match=r"policy 'unified' of fakes 1\.2 cannot be built"):
        policy.build("a placement")
    regularizer = load("regularizer", "mse").recipe.image.regularizers[0]
    assert regularizer.build()(3) == 3


def test_notes_that_fail(load):
    resolved = load("policy", "unified", notes=fails(OSError("no disk")))
    with pytest.raises(PluginError, match="cannot say its notes: OSError: no disk"):
        resolved.notes()
