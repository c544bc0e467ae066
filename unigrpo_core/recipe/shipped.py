"""Where the shipped recipes are, and how a word on the command line names one."""

from __future__ import annotations

from pathlib import Path

from unigrpo_core.errors import did_you_mean
from unigrpo_core.recipe.problems import Origin, Problem, RecipeError


def shipped_recipes() -> Path:
    """The folder of the shipped recipes: in an installed wheel ``unigrpo_recipes`` beside the
    package, in a checkout ``recipes``."""
    beside = Path(__file__).resolve().parents[2]
    installed = beside / "unigrpo_recipes"
    return installed if installed.is_dir() else beside / "recipes"


def shipped_names() -> list[str]:
    """The names of the shipped recipes that run as they are (fragments, in folders that begin
    with an underscore, do not)."""
    root = shipped_recipes()
    names = (file.relative_to(root).with_suffix("") for file in root.rglob("*.toml"))
    return sorted(
        name.as_posix() for name in names if not any(part.startswith("_") for part in name.parts)
    )


def shipped_file(name: str) -> Path:
    """The file of a shipped recipe."""
    return shipped_recipes() / f"{name}.toml"


def find_recipe(word: str | Path) -> Path:
    """The file that a word means: an existing path, else a shipped recipe by its name or by its
    path below the shipped recipes, with or without ``.toml`` and a leading ``recipes/``.

    Raises:
        RecipeError: there is none; the message names near misses.
    """
    path = Path(word)
    if path.exists():
        return path
    name = path.relative_to("recipes") if path.parts[:1] == ("recipes",) else path
    for candidate in (name.as_posix(), f"{name.as_posix()}.toml"):
        file = shipped_recipes() / candidate
        if file.is_file():
            return file
    stem = name.as_posix().removesuffix(".toml")
    message = f"no such file, and no shipped recipe{did_you_mean(stem, shipped_names())}"
    raise RecipeError([Problem(Origin(path), "", message)])
