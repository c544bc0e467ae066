"""Rules on the shape of a recipe: episodes, groups, updates, and what comes before."""

from __future__ import annotations

from pathlib import Path

from unigrpo_core.recipe.broken import VIEWS, Broke, Broken, episodes
from unigrpo_core.recipe.schema import EXPERT_OF, Recipe

EPISODES = (("think", "draw"), ("draw",), ("think",))


def _parts(recipe: Recipe) -> Broke:
    """A policy of parts has each of them, of a policy that does its work; another has none."""
    policy = recipe.policy
    asked, stated = policy.component.provider.parts, policy.parts
    for name in asked:
        if name not in stated:
            message = f"{policy.use!r} is made of parts: state policy.{name} = {{ use = ... }}"
            yield Broken(("policy", name), message)
    for name, part in stated.items():
        if name not in asked:
            yield Broken(("policy", name), f"{policy.use!r} is not made of parts; take it out")
        elif name not in part.provides:
            can = ", ".join(sorted(part.provides)) or "nothing"
            message = f"{part.use!r} provides {can}, and this part has to provide {name!r}"
            yield Broken(("policy", name, "use"), message)


def _episode(recipe: Recipe) -> Broke:
    for path, episode in episodes(recipe):
        if episode not in EPISODES:
            may = ", ".join(str(list(one)) for one in EPISODES)
            message = f"several rounds are not supported yet; an episode may be one of {may}"
            yield Broken(path, message)


def _views(recipe: Recipe) -> Broke:
    seen: set[str] = set()
    for place, view in enumerate(recipe.views[1:]):
        if view.name in seen:
            yield Broken((*VIEWS, place, "name"), f"{view.name!r} is stated twice")
        seen.add(view.name)
        if view.thoughts == "swapped" and view.episode != ("think", "draw"):
            message = f"there is nothing to swap: its episode is {list(view.episode or ())}"
            yield Broken((*VIEWS, place, "thoughts"), message)
        elif view.thoughts == "swapped" and recipe.evaluation.final_prompts < 2:
            message = "thoughts of one prompt cannot be swapped; 2 are needed"
            yield Broken(("evaluation", "final_prompts"), message)


def _fan_out(recipe: Recipe) -> Broke:
    got, want = len(recipe.group.fan_out), len(recipe.episode)
    if got != want:
        message = f"should have one number per segment of the episode: {want}, got {got}"
        yield Broken(("group", "fan_out"), message)


def _train(recipe: Recipe) -> Broke:
    experts = [EXPERT_OF[segment] for segment in recipe.episode]
    for place, expert in enumerate(recipe.train):
        if expert not in experts:
            message = f"the episode {list(recipe.episode)} has no segment of the {expert} expert"
            yield Broken(("train", place), message)
        if expert in recipe.train[:place]:
            yield Broken(("train", place), f"{expert!r} is stated twice")
    if not recipe.train and recipe.steps:
        message = f"names no expert, so the {recipe.steps} steps would train nothing (steps = 0?)"
        yield Broken(("train",), message)


def _updates(recipe: Recipe) -> Broke:
    count, prompts = recipe.updates.count, recipe.prompts
    if recipe.updates.data == "disjoint" and prompts % count:
        below, above = prompts - prompts % count, prompts - prompts % count + count
        close = min(count, prompts)
        around = (n for by in range(1000) for n in (close - by, close + by) if n > 0)
        nearest = next((n for n in around if prompts % n == 0), 1)
        message = (
            f"prompts = {prompts} cannot be split into updates.count = {count} equal parts; "
            f"nearest are prompts = {f'{below} or {above}' if below else above}, "
            f'or updates.count = {nearest} (or updates.data = "repeat")'
        )
        yield Broken(("updates", "count"), message, other=("prompts",))


def _start(recipe: Recipe) -> Broke:
    if recipe.start and not (Path(recipe.start) / "final").is_dir():
        message = f"should be the folder of a finished run, but {recipe.start} has no folder final"
        yield Broken(("start",), message)


def _after(recipe: Recipe) -> Broke:
    if recipe.after and not recipe.start and not Path(recipe.after).is_file():
        yield Broken(("after",), f"should be a recipe's file, but there is no {recipe.after}")


def _compute(recipe: Recipe) -> Broke:
    if recipe.compute.compile and recipe.compute.checkpointing == "selective":
        message = (
            '"selective" chooses among operations that compute.compile fuses; take "full" or '
            '"none", or leave compile out'
        )
        yield Broken(("compute", "checkpointing"), message)


SHAPE_RULES = (_parts, _episode, _views, _fan_out, _train, _updates, _start, _after, _compute)
