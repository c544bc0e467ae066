"""Rules on the methods that a recipe is filled with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from math import prod

from unigrpo_core.recipe.broken import VIEWS, Broke, Broken, built, episodes
from unigrpo_core.recipe.positions import KeyPath
from unigrpo_core.recipe.schema import EXPERT_OF, Recipe, Segment
from unigrpo_core.recipe.slots import GuidanceSlot
from unigrpo_core.records import FlowStep, TokenStep

_TOKEN_FIELDS = frozenset(field.name for field in fields(TokenStep))
_FLOW_FIELDS = frozenset(field.name for field in fields(FlowStep)) | {"std"}


def _required(recipe: Recipe) -> Broke:
    draws = "draw" in recipe.episode
    draws_later = any("draw" in (view.episode or ()) for view in recipe.views)
    image = draws and "image" in recipe.train
    objective = recipe.image.objective
    stored = image and not (objective and built(objective, ("image", "objective")).fresh)
    wanted: list[tuple[KeyPath, object, bool]] = [
        (("advantage",), recipe.advantage, bool(recipe.train)),
        (("text", "objective"), recipe.text.objective, "text" in recipe.train),
        (("image", "objective"), recipe.image.objective, image),
        (("image", "window"), recipe.image.window, stored),
        (("image", "scheduler"), recipe.image.scheduler, draws),
        (("image", "guidance"), recipe.image.guidance, draws),
        (("evaluation", "scheduler"), recipe.evaluation.scheduler, draws_later),
        (("evaluation", "guidance"), recipe.evaluation.guidance, draws_later),
    ]
    for path, slot, needed in wanted:
        if needed and slot is None:
            why = f"episode {list(recipe.episode)} and train = {list(recipe.train)}"
            yield Broken(path, f'required by {why}: say {{ use = "..." }}')


def _policy(recipe: Recipe) -> Broke:
    segments = dict.fromkeys(segment for _, episode in episodes(recipe) for segment in episode)
    for segment in segments:
        if EXPERT_OF[segment] not in recipe.policy.provides:
            can = ", ".join(sorted(recipe.policy.provides))
            message = (
                f"cannot {segment}: the episode needs a policy that provides "
                f"{EXPERT_OF[segment]!r}, and {recipe.policy.use!r} provides {can or 'nothing'}"
            )
            yield Broken(("policy", "use"), message)


def _groups(recipe: Recipe) -> Broke:
    for place, segment in enumerate(recipe.episode):
        expert = EXPERT_OF[segment]
        if expert not in recipe.train or (expert == "image" and _scored(recipe)):
            continue
        siblings = expert == "image" and recipe.image.group_by == "siblings"
        counts = recipe.group.fan_out[place : place + 1] if siblings else recipe.group.fan_out
        if siblings and prod(counts) < 2:
            message = (
                f'"siblings" needs at least 2 images per thought, and group.fan_out[{place}] is 1'
            )
            yield Broken(("image", "group_by"), message)
        elif prod(counts[: place + 1]) < 2:
            message = f"makes {expert} groups of 1, whose advantages are all 0; 2 are needed"
            yield Broken(("group", "fan_out"), message)


def _scored(recipe: Recipe) -> bool:
    """Whether images are trained by the score itself, and need none to be compared with."""
    slot = recipe.image.objective
    return slot is not None and "score" in built(slot, ("image", "objective")).needs


def _regularizers(recipe: Recipe) -> Broke:
    tables = (
        ("text", recipe.text.regularizers, "TokenStep", _TOKEN_FIELDS, "image", _FLOW_FIELDS),
        ("image", recipe.image.regularizers, "FlowStep", _FLOW_FIELDS, "text", _TOKEN_FIELDS),
    )
    for expert, slots, step, has, other, other_has in tables:
        for place, slot in enumerate(slots):
            needs = set(slot.component.provider.needs)
            lacks = ", ".join(sorted(needs - has))
            if not lacks:
                continue
            reads = f"{slot.use!r} reads {lacks}, which a {step} does not have"
            path = (expert, "regularizers", place, "use")
            if needs <= other_has:
                yield Broken(path, f"{reads}: it belongs in {other}.regularizers")
            else:
                yield Broken(path, f"{reads}, and nor does any other record", plugin=True)


def _branches(recipe: Recipe) -> Broke:
    provides = recipe.policy.provides
    tables: list[tuple[KeyPath, tuple[Segment, ...] | None, GuidanceSlot | None]] = [
        (("image", "guidance"), recipe.episode, recipe.image.guidance)
    ]
    for place, view in enumerate(recipe.views):
        stated = place and recipe.evaluation.views[place - 1].guidance
        path: KeyPath = (*VIEWS, place - 1) if stated else ("evaluation",)
        tables.append(((*path, "guidance"), view.episode, view.guidance))
    for path, episode, slot in tables:
        if slot is None or "draw" not in (episode or ()):
            continue
        for branch in built(slot, path).branches:
            if f"branch:{branch}" not in provides:
                message = (
                    f"{slot.use!r} needs the unconditional branch {branch!r}, which policy "
                    f"{recipe.policy.use!r} does not provide"
                )
                yield Broken(path, message)


def _average(recipe: Recipe) -> Broke:
    """Whoever needs a moving average of the weights has one, and none is kept for nobody."""
    readers = list(_readers(recipe))
    if recipe.ema.decay:
        if not recipe.ema.sample and not readers:
            message = (
                "nothing reads the moving average: what is evaluated and saved are the current "
                'weights; set ema.sample, or anchor = "ema" of a regularizer, or leave it out'
            )
            yield Broken(("ema", "decay"), message)
        return
    why = "there is no moving average of the weights: set ema.decay, such as 0.9"
    for key, stated in (("sample", recipe.ema.sample), ("slope", recipe.ema.slope)):
        if stated:
            yield Broken(("ema", key), why)
    for path, who in readers:
        yield Broken(path, f"{who}{why}")


def _readers(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Who compares with a moving average, and how a message on that begins."""
    slot = recipe.image.objective
    if "image" in recipe.train and slot and "ema" in built(slot, ("image", "objective")).needs:
        yield ("image", "objective"), f"{slot.use!r} needs it, but "
    for expert, slots in (("text", recipe.text.regularizers), ("image", recipe.image.regularizers)):
        for place, penalty in enumerate(slots):
            if penalty.weight and penalty.compares_with == "ema" and expert in recipe.train:
                yield (expert, "regularizers", place, "anchor"), ""


def _turns(recipe: Recipe) -> Broke:
    if recipe.updates.turns and set(recipe.train) != {"text", "image"}:
        message = f"takes two experts in turn, and train = {list(recipe.train)}"
        yield Broken(("updates", "turns"), message)


METHOD_RULES = (_required, _policy, _groups, _regularizers, _branches, _average, _turns)
