"""Rules that cross keys, checked before any model is loaded.

They may build the light objects of methods, which import no torch for what is asked here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from unigrpo_core.recipe.broken import Broke, Broken, CannotBuildError
from unigrpo_core.recipe.image_rules import IMAGE_RULES
from unigrpo_core.recipe.method_rules import METHOD_RULES
from unigrpo_core.recipe.schema import Recipe
from unigrpo_core.recipe.shape_rules import SHAPE_RULES


def broken_rules(recipe: Recipe) -> list[Broken]:
    """All that is wrong; the rules on methods are asked only of an episode that makes sense."""
    return _ask(SHAPE_RULES, recipe) or _ask((*METHOD_RULES, *IMAGE_RULES), recipe)


def _ask(rules: Sequence[Callable[[Recipe], Broke]], recipe: Recipe) -> list[Broken]:
    found: list[Broken] = []
    for rule in rules:
        try:
            found.extend(rule(recipe))
        except CannotBuildError as error:
            found.append(error.broken)
    return list(dict.fromkeys(found))
