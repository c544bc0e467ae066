"""The stars of the paper's ablation: every recipe is the centre with fragments laid on, no more."""

import tomllib
from pathlib import Path

import pytest

from unigrpo_core.catalog import load_catalog
from unigrpo_core.recipe import difference, load_recipe, shipped_recipes

PAPER = shipped_recipes() / "paper"
CELLS = sorted(file.stem for file in PAPER.glob("*.toml"))
OTHERS = [name for name in CELLS if name != "joint"]
SAID = ("extends", "title")


@pytest.fixture(scope="module")
def loaded():
    catalog = load_catalog()
    return {name: load_recipe(PAPER / f"{name}.toml", catalog) for name in CELLS}


def stated(file: Path) -> dict:
    return tomllib.loads(file.read_text())


def own(file: Path) -> set[str]:
    """The dotted keys that a file states itself; a component counts as one."""

    def keys(table, above=""):
        for key, value in table.items():
            if isinstance(value, dict) and "use" not in value:
                yield from keys(value, f"{above}{key}.")
            else:
                yield f"{above}{key}"

    return {key for key in keys(stated(file)) if key not in SAID}


def laid_on(name: str) -> set[str]:
    """The keys of the recipe itself and of whatever it extends, but for the centre."""
    file, found = PAPER / f"{name}.toml", set()
    files = [file]
    while files:
        file = files.pop()
        found |= own(file)
        parents = (
            [file.parent / parent for parent in stated(file)["extends"]]
            if ("extends" in stated(file))
            else []
        )
        files += [parent for parent in parents if parent.stem != "joint"]
    return found


@pytest.mark.parametrize("name", OTHERS)
def test_a_cell_is_an_extends_and_at_most_three_lines(name):
    lines = (PAPER / f"{name}.toml").read_text().splitlines()
    assert lines[0].startswith("extends = [")
    assert len(lines) - 1 <= 3


@pytest.mark.parametrize("name", OTHERS)
def test_a_cell_differs_from_joint_only_in_the_keys_of_its_fragments(loaded, name):
    keys = laid_on(name)
    changed = [path for path, *_ in difference(loaded["joint"], loaded[name])]
    strays = [p for p in changed if not any(p == key or p.startswith(f"{key}.") for key in keys)]
    assert changed, f"{name} is joint itself"
    assert not strays, f"{name} also changes {strays}"


def test_no_two_cells_are_the_same(loaded):
    hashes = [(loaded[name].hash, loaded[name].recipe.after) for name in CELLS]
    assert len({*hashes}) == len(CELLS)


def test_every_level_of_the_stars_is_there(loaded):
    """The levels of the axes of the paper's grid (which part is trained, thinking in training,
    guidance in training, regularizer), read off the resolved recipes."""
    recipes = [item.recipe for item in loaded.values()]
    trained = {(recipe.train, "then" if recipe.after else "") for recipe in recipes}
    assert trained == {
        ((), ""),
        (("text",), ""),
        (("image",), ""),
        (("text",), "then"),
        (("text", "image"), ""),
    }
    assert {recipe.episode for recipe in recipes} == {("think", "draw"), ("draw",)}
    assert {recipe.image.guidance.use for recipe in recipes} == {"none", "cfg"}
    used = {tuple(item.use for item in recipe.image.regularizers) for recipe in recipes}
    assert used == {(), ("latent_kl",), ("velocity_mse",)}


def test_all_are_evaluated_alike(loaded):
    """So that they compare: with and without guidance, with and without a thought."""
    evaluations = {name: item.values["evaluation"] for name, item in loaded.items()}
    assert all(item == evaluations["joint"] for item in evaluations.values())
    views = loaded["joint"].recipe.views
    assert [view.episode for view in views].count(("draw",)) == 1
    assert [view.guidance.use for view in views].count("cfg") == 1
