"""Recipes: from TOML files to one typed, checked description of a run."""

from unigrpo_core.recipe.beside import with_plugin_file
from unigrpo_core.recipe.emit import inline as toml_value
from unigrpo_core.recipe.problems import Origin, Problem, RecipeError
from unigrpo_core.recipe.resolve import Resolved, difference, load_recipe, shipped_titles
from unigrpo_core.recipe.schema import Recipe, slots
from unigrpo_core.recipe.shipped import find_recipe, shipped_recipes
from unigrpo_core.recipe.source import parse_value

__all__ = [
    "Origin",
    "Problem",
    "Recipe",
    "RecipeError",
    "Resolved",
    "difference",
    "find_recipe",
    "load_recipe",
    "parse_value",
    "shipped_recipes",
    "shipped_titles",
    "slots",
    "toml_value",
    "with_plugin_file",
]
