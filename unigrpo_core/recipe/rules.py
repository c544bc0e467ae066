"""Rules that cross keys, checked before any model is loaded.

They may build the light objects of methods, which import no torch for what is asked here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

from unigrpo_core.errors import PluginError, UserError
from unigrpo_core.interfaces import ImageObjective, Scheduler, Window
from unigrpo_core.keys import Key
from unigrpo_core.recipe.positions import KeyPath
from unigrpo_core.recipe.schema import (
    EXPERT_OF,
    GuidanceSlot,
    Recipe,
    SchedulerSlot,
    Segment,
    Slot,
)
from unigrpo_core.records import FlowStep, TokenStep

_EPISODES = (("think", "draw"), ("draw",), ("think",))
ROLLOUTS = 1000
"""Rollouts whose windows are looked at, from the first on."""

_VIEWS: KeyPath = ("evaluation", "views")

_TOKEN_FIELDS = frozenset(field.name for field in fields(TokenStep))
_FLOW_FIELDS = frozenset(field.name for field in fields(FlowStep)) | {"std"}


@dataclass(frozen=True)
class Broken:
    """A rule that the recipe breaks, at a key; ``other`` is a key that the rule weighs it against:
    the one stated last is told."""

    path: KeyPath
    message: str
    plugin: bool = False
    other: KeyPath | None = None


Broke = Iterator[Broken]


def broken_rules(recipe: Recipe) -> list[Broken]:
    """All that is wrong; the rules on methods are asked only of an episode that makes sense."""
    return _ask(_SHAPE_RULES, recipe) or _ask(_METHOD_RULES, recipe)


def _ask(rules: Sequence[Callable[[Recipe], Broke]], recipe: Recipe) -> list[Broken]:
    found: list[Broken] = []
    for rule in rules:
        try:
            found.extend(rule(recipe))
        except _CannotBuildError as error:
            found.append(error.broken)
    return list(dict.fromkeys(found))


class _CannotBuildError(Exception):
    def __init__(self, broken: Broken) -> None:
        self.broken = broken


def _built(slot: Slot, path: KeyPath) -> Any:
    try:
        return slot.build()
    except UserError as error:
        raise _CannotBuildError(Broken(path, str(error), isinstance(error, PluginError))) from error


# --- the shape of an episode ------------------------------------------------------------------


def _episodes(recipe: Recipe) -> Iterator[tuple[KeyPath, tuple[Segment, ...]]]:
    """The episodes that it states, each with its path: of training, of evaluation, of views."""
    yield ("episode",), recipe.episode
    if recipe.evaluation.episode is not None:
        yield ("evaluation", "episode"), recipe.evaluation.episode
    for place, view in enumerate(recipe.evaluation.views):
        if view.episode is not None:
            yield (*_VIEWS, place, "episode"), view.episode


def _episode(recipe: Recipe) -> Broke:
    for path, episode in _episodes(recipe):
        if episode not in _EPISODES:
            may = ", ".join(str(list(one)) for one in _EPISODES)
            message = f"several rounds are not supported yet; an episode may be one of {may}"
            yield Broken(path, message)


def _views(recipe: Recipe) -> Broke:
    seen: set[str] = set()
    for place, view in enumerate(recipe.views[1:]):
        if view.name in seen:
            yield Broken((*_VIEWS, place, "name"), f"{view.name!r} is stated twice")
        seen.add(view.name)
        if view.thoughts == "swapped" and view.episode != ("think", "draw"):
            message = f"there is nothing to swap: its episode is {list(view.episode or ())}"
            yield Broken((*_VIEWS, place, "thoughts"), message)
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


# --- the methods it is filled with ------------------------------------------------------------


def _required(recipe: Recipe) -> Broke:
    draws = "draw" in recipe.episode
    draws_later = any("draw" in (view.episode or ()) for view in recipe.views)
    image = draws and "image" in recipe.train
    objective = recipe.image.objective
    stored = image and not (objective and _built(objective, ("image", "objective")).fresh)
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
    segments = dict.fromkeys(segment for _, episode in _episodes(recipe) for segment in episode)
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
        if expert not in recipe.train:
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


def _window(recipe: Recipe) -> Broke:
    window, scheduler = recipe.image.window, recipe.image.scheduler
    if "draw" in recipe.episode and window and scheduler:
        try:
            _built(window, ("image", "window")).count(scheduler.steps)
        except ValueError as error:
            yield Broken(("image", "window"), str(error))


def _stochastic(recipe: Recipe) -> Broke:
    scheduler, objective = recipe.image.scheduler, recipe.image.objective
    if "image" not in recipe.train or scheduler is None:
        return
    fresh = objective is not None and _built(objective, ("image", "objective")).fresh
    divides: list[tuple[KeyPath, Slot]] = [
        (("image", "regularizers", place), slot)
        for place, slot in enumerate(recipe.image.regularizers)
        if "std" in slot.component.provider.needs and not fresh
    ]
    if objective and "std" in objective.component.provider.needs:
        divides.insert(0, (("image", "objective"), objective))
    why = _why_no_noise(scheduler) if divides else ""
    for path, slot in divides if why else ():
        message = (
            f"{slot.use!r} divides by the std of a step, and under image.scheduler "
            f"{scheduler.use!r} nothing would be stochastic: {why}"
        )
        yield Broken(path, message)


def _objective(recipe: Recipe) -> Broke:
    """What an image objective takes of the rest: noise, a unit, gradients of rewards."""
    slot, scheduler = recipe.image.objective, recipe.image.scheduler
    if "image" not in recipe.train or slot is None:
        return
    path: KeyPath = ("image", "objective")
    objective: ImageObjective = _built(slot, path)
    for place, penalty in enumerate(recipe.image.regularizers):
        if objective.fresh and "std" in penalty.component.provider.needs:
            message = (
                f"{penalty.use!r} divides by the std of a step, and the points of image.objective "
                f"{slot.use!r} are its own, without noise; take one that reads velocities"
            )
            yield Broken(("image", "regularizers", place), message)
    unit = None if scheduler is None else _built(scheduler, ("image", "scheduler")).unit
    if unit and objective.unit and objective.unit != unit:
        message = (
            f"the clip range of {slot.use!r} is in {objective.unit}, and log-ratios of "
            f"image.scheduler {scheduler and scheduler.use!r} are in {unit}: set clip_unit = "
            f'"{unit}", with a clip range of that size, or take another scheduler'
        )
        yield Broken(path, message)
    for place, reward in enumerate(recipe.rewards if "score" in objective.needs else ()):
        if reward.weight and not reward.component.provider.differentiable:
            message = (
                f"{reward.use!r} is not differentiable, and image.objective {slot.use!r} goes down "
                f"its gradient: take another reward, or weight = 0 and one that is, or another "
                "objective"
            )
            yield Broken(("rewards", place), message)


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
    if "image" in recipe.train and slot and "ema" in _built(slot, ("image", "objective")).needs:
        yield ("image", "objective"), f"{slot.use!r} needs it, but "
    for expert, slots in (("text", recipe.text.regularizers), ("image", recipe.image.regularizers)):
        for place, penalty in enumerate(slots):
            if penalty.weight and penalty.compares_with == "ema" and expert in recipe.train:
                yield (expert, "regularizers", place, "anchor"), ""


def _turns(recipe: Recipe) -> Broke:
    if recipe.updates.turns and set(recipe.train) != {"text", "image"}:
        message = f"takes two experts in turn, and train = {list(recipe.train)}"
        yield Broken(("updates", "turns"), message)


def _noise(recipe: Recipe) -> Broke:
    """What a scheduler can do: of noise so much, and perhaps none in the last step."""
    slot, window, objective = recipe.image.scheduler, recipe.image.window, recipe.image.objective
    if slot is None or "draw" not in recipe.episode:
        return
    scheduler: Scheduler = _built(slot, ("image", "scheduler"))
    if slot.noise_level > scheduler.most_noise:
        message = (
            f"{slot.use!r} takes noise levels up to {scheduler.most_noise:g}, "
            f"got {slot.noise_level:g}"
        )
        yield Broken(("image", "scheduler", "noise_level"), message)
    trained = (*([objective] if objective else ()), *recipe.image.regularizers)
    divides = "image" in recipe.train and any(
        "std" in part.component.provider.needs for part in trained
    )
    if slot.noise_level and not scheduler.stochastic and not divides:
        message = f"{slot.use!r} has no noise, got {slot.noise_level:g}: leave it out"
        yield Broken(("image", "scheduler", "noise_level"), message)
    if scheduler.last_step or not divides or window is None:
        return
    built: Window = _built(window, ("image", "window"))
    for step in range(1, min(recipe.steps, ROLLOUTS) + 1):
        key = Key((recipe.seed, "train", step)).child("window")
        if slot.steps - 1 in built.steps(slot.steps, key, step):
            message = (
                f"the last step of image.scheduler {slot.use!r} has no noise, and this window has "
                f"rollout {step} train on it; keep it to the steps before {slot.steps - 1}"
            )
            yield Broken(("image", "window"), message)
            return


def _why_no_noise(scheduler: SchedulerSlot) -> str:
    """Why no step under this scheduler has noise; empty if some may have."""
    if not _built(scheduler, ("image", "scheduler")).stochastic:
        return "its std is always 0"
    return "" if scheduler.noise_level else "its noise_level is 0"


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
        path: KeyPath = (*_VIEWS, place - 1) if stated else ("evaluation",)
        tables.append(((*path, "guidance"), view.episode, view.guidance))
    for path, episode, slot in tables:
        if slot is None or "draw" not in (episode or ()):
            continue
        for branch in _built(slot, path).branches:
            if f"branch:{branch}" not in provides:
                message = (
                    f"{slot.use!r} needs the unconditional branch {branch!r}, which policy "
                    f"{recipe.policy.use!r} does not provide"
                )
                yield Broken(path, message)


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


def _compute(recipe: Recipe) -> Broke:
    if recipe.compute.compile and recipe.compute.checkpointing == "selective":
        message = (
            '"selective" chooses among operations that compute.compile fuses; take "full" or '
            '"none", or leave compile out'
        )
        yield Broken(("compute", "checkpointing"), message)


_SHAPE_RULES = (_parts, _episode, _views, _fan_out, _train, _updates, _start, _after, _compute)
_METHOD_RULES = (
    _required,
    _policy,
    _groups,
    _window,
    _stochastic,
    _regularizers,
    _branches,
    _objective,
    _noise,
    _average,
    _turns,
)
