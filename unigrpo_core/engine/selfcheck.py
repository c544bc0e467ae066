"""The self-check: does this recipe, with this model, on this machine, train what it should?

One rollout, one pass over its updates, in memory only (two, where the experts train in turns: one
of each). Everything that a run would stop at is found here, and some things that it would only
count: a reward that is the same for all, a step that changes next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unigrpo_core.engine.checks import check_prompts
from unigrpo_core.engine.clock import Clock
from unigrpo_core.engine.cuts import said_of_cuts
from unigrpo_core.engine.experience import Experience, gather
from unigrpo_core.engine.faults import told
from unigrpo_core.engine.gap import CLIP_SHARE, IMAGE_MAX, RADIUS_SHARE, TEXT_MAX, TEXT_MEAN
from unigrpo_core.engine.scoring import equal_groups
from unigrpo_core.engine.setup import Setup, build_setup
from unigrpo_core.engine.update import Updater
from unigrpo_core.errors import UserError
from unigrpo_core.recipe import Resolved

FEW = 0.5  # of an expert's weights: a step that changes fewer is next to nothing


@dataclass(frozen=True)
class Finding:
    """Something looked at: whether it is fine, the figures, and what to change if it is not (empty
    where the figures say so themselves). ``code`` is the exit code that a wrong one stands for."""

    name: str
    ok: bool
    figures: str
    change: str = ""
    code: int = 1


def self_check(resolved: Resolved) -> Iterator[Finding]:
    """What is found, as it is found; it ends at the first thing without which there is no next."""
    try:
        setup = build_setup(resolved)
        yield _model(setup)
        with told(setup.recipe):
            yield from _found(setup)
    except UserError as error:
        yield Finding("stopped", False, str(error), code=error.exit_code)


def _found(setup: Setup) -> Iterator[Finding]:
    notes = check_prompts(setup)
    yield Finding("prompts", True, "; ".join(notes) or "the policy takes all that were looked at")
    if not setup.recipe.train:
        yield Finding("training", True, "the recipe trains nothing")
        return
    updater = Updater(setup)
    found = gather(setup, 1, Clock(setup.device))
    samples = [_sizes(found), "finite, each from draws of its own", *said_of_cuts(found.cut)]
    yield Finding("samples", True, "; ".join(samples))
    yield from _rewards(setup, found)
    yield from _trained(setup, updater, found)
    turns = setup.recipe.updates.turns
    if turns is not None:
        yield from _trained(setup, updater, gather(setup, turns.text + 1, Clock(setup.device)))
    if "reference" in updater.anchors:
        yield Finding("reference", True, "computes after the update what it did before")


def _trained(setup: Setup, updater: Updater, found: Experience) -> Iterator[Finding]:
    """The rollout's updates, of the experts whose turn it is."""
    before = {
        expert: [p.detach().clone() for p in updater.experts[expert]] for expert in found.data.train
    }
    metrics = updater(found.data)
    yield from _gaps(setup, found, metrics)
    for expert in sorted(found.data.train):
        parameters = updater.experts[expert]
        yield Finding(f"{expert} gradient", True, f"norm {metrics[f'{expert}/grad_norm']:.2g}")
        yield _step(expert, before[expert], [p.detach() for p in parameters])


def _model(setup: Setup) -> Finding:
    recipe, sizes = setup.recipe, []
    for expert, owned in setup.policy.parameters().items():
        count = sum(p.numel() for p in owned.values() if p.requires_grad)
        sizes.append(f"{count:,} {expert} weights train" if count else f"{expert} is frozen")
    where = f"{setup.device}, {recipe.compute.precision}"
    return Finding("model", True, f"{recipe.policy.use} on {where}; {'; '.join(sizes)}")


def _sizes(found: Experience) -> str:
    rollout, kept = found.sampled.rollout, found.counts.get("groups/kept")
    rows = [str(len(rollout.prompts)), *(str(len(parents)) for parents in rollout.parents)]
    trained = "" if kept is None else f", of which {kept:.0f} prompts are trained on"
    return f"{' > '.join(rows)} prompts and segments{trained}"


def _rewards(setup: Setup, found: Experience) -> Iterator[Finding]:
    scores, rollout = found.sampled.scores, found.sampled.rollout
    groups = len(rollout.prompts)
    for name, values in zip(scores.names, scores.values.T, strict=True):
        inside = float(values.view(groups, -1).double().std(1).mean())
        figures = f"mean {float(values.double().mean()):.3g}, std within a prompt {inside:.2g}"
        yield Finding(f"reward {name}", True, figures)
    for name, share in equal_groups(setup.recipe, rollout, scores).items():
        yield Finding(
            f"{name.partition('/')[0]} groups",
            share < 1,
            f"{share:.0%} have one and the same reward throughout, so they teach nothing",
            "rewards, to some that tell these episodes apart; or source, or group.fan_out",
        )


def _gaps(setup: Setup, found: Experience, metrics: Mapping[str, float]) -> Iterator[Finding]:
    """The gap's figures beside their limits; beyond them the update would have stopped."""
    precision = setup.recipe.compute.precision
    if "gap/text_mean" in metrics:
        mean, most = metrics["gap/text_mean"], metrics["gap/text_max"]
        figures = f"mean {mean:.1e} (at most {TEXT_MEAN[precision]:.0e}), max {most:.1e}"
        limit = TEXT_MAX[precision]
        figures += f" (at most {limit:.0e})" if limit < 1 else ""
        beyond = metrics["gap/text_beyond"]
        figures += f" but for {beyond:.0f} tokens, few enough for rounding" if beyond else ""
        yield Finding("text, sampler against trainer", True, figures)
    objective, points = setup.image_objective, found.data.points
    if objective is None or points is None or objective.fresh:
        return
    clip = objective.clip_range(points.x_t.shape[2:].numel())
    ratio, share = metrics["gap/image_log_ratio"], metrics["gap/image_radius_share"]
    shift = f"shift of the mean {share:.1e} clip radii"
    if precision == "float32":
        figures = (
            f"log-ratio {ratio:.1e} (at most {min(IMAGE_MAX, CLIP_SHARE * clip):.1e}), {shift}"
        )
    else:
        figures = f"{shift} (at most {RADIUS_SHARE}), log-ratio {ratio:.1e}"
    yield Finding("images, sampler against trainer", True, f"{figures}; clip range {clip:.1e}")
    twice = metrics["gap/trainer_twice"]
    figures = f"log-ratio {twice:.1e} apart (at most {CLIP_SHARE * clip:.1e})"
    yield Finding("the trainer, twice", True, figures)


def _step(expert: str, before: list[Tensor], after: list[Tensor]) -> Finding:
    total = sum(p.numel() for p in after)
    changed = sum(int((a != b).sum()) for a, b in zip(after, before, strict=True))
    sizes = [(a - b).abs().sum() for a, b in zip(after, before, strict=True)]
    mean = float(torch.stack(sizes).sum()) / total
    return Finding(
        f"{expert} step",
        changed >= FEW * total,
        f"{changed / total:.0%} of the weights changed, by {mean:.1e} on average",
        f"{expert}.lr, which is lost in the rounding of the weights, or what is trained: parts "
        "of the model that it does not use",
    )
