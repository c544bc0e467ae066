"""Why sampler and trainer disagree: the likely cause, from what was stored and what is computed.

Asked only once the gap is too large, so it may compute as much as it likes. A cause is named when
trying it out makes the figures agree, not when it is merely possible.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from unigrpo_core.engine.setup import Setup
from unigrpo_core.engine.trainset import MicroBatch, TrainSet
from unigrpo_core.records import Points

# Relative to the step taken: up to here two means differ by rounding.
ROUNDING = {"float32": 1e-4, "bf16": 3e-2}

Velocities = Callable[[Points], Tensor]


class Old(Protocol):
    """The trainer's values of every context."""

    @property
    def logps(self) -> Tensor: ...  # [B, L]

    @property
    def guided(self) -> Tensor | None: ...  # [B, K, *]


NOISE_FLOOR = (
    "everything agrees up to rounding, so the clip range is below the noise floor of this "
    "precision: raise clip_range (or clip_radius), or compute in float32"
)
NETWORK = (
    "the trainer's network computes something else than the sampler's: look at positions, "
    "attention masks, the context, dropout, and weights that changed in between"
)
TWICE = (
    "two replays of the same rows differ: dropout, a kernel that is not deterministic, or a clip "
    "range below the noise floor of this precision"
)
NOT_FINITE = "a stored latent, mean or velocity is not finite: the model has diverged"


def causes(
    problems: Collection[str],
    setup: Setup,
    data: TrainSet,
    old: Old,
    again: Callable[[MicroBatch, Points], Tensor],
) -> list[str]:
    """Why the trainer's values are not the sampler's, as far as can be told.

    Args:
        problems: what is beyond its limit: "text", "image", "twice".
        old: the trainer's values of every context.
        again: its velocities after guidance at other points of a micro-batch.
    """
    found = [text_cause(old.logps, data)] if "text" in problems else []
    if "image" in problems and setup.training is not None and old.guided is not None:
        cause, compute = NOISE_FLOOR, setup.recipe.compute
        for batch in data.micro_batches(torch.arange(len(data.owner)), compute.replay_tokens):
            points, v = data.part(batch), old.guided[batch.rows, batch.columns]
            assert points is not None
            ask = partial(again, batch)
            cause = image_cause(points, v, setup.training.times, ask, compute.precision)
            if cause != NOISE_FLOOR:
                break
        if not found or cause != NETWORK:  # images under other thoughts differ on their account
            found.append(cause)
    elif "twice" in problems:
        found.append(TWICE)
    return found


def text_cause(logps: Tensor, data: TrainSet) -> str:
    """Why the trainer's log-probs [B, L] are not the stored ones."""
    stored, mask = data.logps, data.mask
    impossible = (~torch.isfinite(logps) & mask).any(1)
    if impossible.any():
        return (
            f"{int(impossible.sum())} thoughts hold a token that the trainer gives no probability: "
            "a padding or special token was sampled; sampler and trainer must both exclude it"
        )
    wrong = ((logps - stored).abs() > 1e-4) & mask
    if wrong.any() and bool((stored[wrong] == 0).all()):
        return (
            f"all {int(wrong.sum())} tokens that differ have a stored log-prob of exactly 0: "
            "padding was counted as sampled; the mask must end with the end-of-sequence token"
        )
    first = wrong.int().argmax(1)[wrong.any(1)]
    if len(first) and bool((first == 0).all()):
        return (
            "thoughts differ from their first token on: sampler and trainer use another prompt, "
            "order of rows, temperature or set of weights"
        )
    return "thoughts differ, but not from their first token on: look at positions, cache and mask"


def image_cause(
    points: Points, v: Tensor, grid: tuple[float, ...], again: Velocities, precision: str
) -> str:
    """Why the transitions of the trainer's velocities miss the stored means.

    Args:
        points: where the trainer was asked, [B, K].
        v: its velocities there [B, K, *], after guidance.
        grid: the times of a rollout, from 1 to 0.
        again: its velocities at other points.
        precision: the type it computes in, a key of ``ROUNDING``.
    """
    for value in (points.x_t, points.x_next, points.old_mean, v):
        if not bool(torch.isfinite(value).all()):
            return NOT_FINITE
    close = ROUNDING[precision]
    off = _miss(points, v) > close
    if not bool(off.any()):
        return NOISE_FLOOR
    if _agrees(points, -v, close):
        return "the sign of the velocity is flipped: it is v = noise - data"
    if _explained(points, v, off, close):
        return (
            "the velocities agree, but not what is made of them: the rollout's scheduler, noise "
            "level or step size is not the trainer's"
        )
    if _agrees(points, again(replace(points, t=1 - points.t)), close):
        return "time is flipped: at 1 - t the trainer agrees (t = 1 is noise, t = 0 is data)"
    for neighbour, move in (("next", 1), ("previous", -1)):
        moved = _moved(points, grid, move)
        if moved is not None and _agrees(moved, again(moved), close):
            return (
                f"the schedule is off by one: at the {neighbour} step of the grid the trainer "
                "agrees; t and t_next must be those of the step that was taken"
            )
    return NETWORK


def _miss(points: Points, v: Tensor) -> Tensor:
    """[B, K]: how far the mean is from the stored one, relative to the step that was taken."""
    off: Tensor = (points.transition(v).mean - points.old_mean).flatten(2).norm(dim=2)
    taken: Tensor = (points.old_mean - points.x_t).flatten(2).norm(dim=2)
    return off / taken


def _agrees(points: Points, v: Tensor, close: float) -> bool:
    return bool((_miss(points, v) <= close).all())


def _explained(points: Points, v: Tensor, off: Tensor, close: float) -> bool:
    """Whether at every point that is off the stored step is a x_t + b v, for some a and b."""
    for place in off.nonzero().tolist():
        x, mean, u = (
            value[tuple(place)].flatten().double() for value in (points.x_t, points.old_mean, v)
        )
        basis, step = torch.stack((x, u), 1), mean - x
        fit = torch.linalg.lstsq(basis, step[:, None]).solution[:, 0]
        if float((basis @ fit - step).norm() / step.norm()) > close:
            return False
    return True


def _moved(points: Points, grid: tuple[float, ...], move: int) -> Points | None:
    """The points as if their steps were others of the grid; None where there is none."""
    times = torch.tensor(grid, dtype=points.t.dtype, device=points.t.device)
    index = (points.t[..., None] - times).abs().argmin(-1) + move
    if int(index.min()) < 0 or int(index.max()) > len(grid) - 2:
        return None
    return replace(points, t=times[index], t_next=times[index + 1])
