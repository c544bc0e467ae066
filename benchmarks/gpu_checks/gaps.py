"""Case 11: law 3's gaps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from unigrpo_models.bagel.policy import BagelPolicy

from gpu_checks.engine import reduced
from gpu_checks.harness import Bench, UnavailableError
from gpu_checks.models import Compiled
from gpu_checks.scales import Scale
from unigrpo_core.engine.clock import Clock
from unigrpo_core.engine.experience import gather
from unigrpo_core.engine.gap import Gap
from unigrpo_core.engine.setup import Setup
from unigrpo_core.engine.trainset import MicroBatch, TrainSet
from unigrpo_core.records import Points, Replay


def gaps(bench: Bench, scale: Scale) -> None:
    """Sampler against trainer, trainer against itself, compiled against eager, and the compute
    type against float32. Images in clip radii; more than 0.25 of the first would stop a run."""
    setup = reduced(bench, scale)
    data = gather(setup, 1, Clock(setup.device)).data
    policy, budget = setup.policy, setup.recipe.compute.replay_tokens
    assert isinstance(policy, BagelPolicy)
    batch = next(data.micro_batches(torch.arange(len(data.owner)), budget))
    points = data.part(batch)
    assert points is not None
    stored = (data.logps[batch.rows, :], points.old_mean)
    eager = _replay(setup, data, batch, points)
    again = _replay(setup, data, batch, points)
    gap = _gap(setup, data, batch, points, eager, again)
    bench.write(
        config="sampler against trainer",
        status="note",
        limits="; ".join(gap.problems().values()) or "kept",
        **gap.metrics(),
        log_ratio_by_time={f"{t:.4f}": worst for t, worst in sorted(gap.by_time.items())},
        **_apart(setup, data, batch, points, eager, stored),
    )
    bench.write(
        config="trainer against itself",
        status="note",
        **_apart(setup, data, batch, points, eager, _values(points, again)),
    )
    with bench.guarded("compiled against eager"):
        fast = Compiled(policy)(lambda: _replay(setup, data, batch, points))
        bench.write(
            config="compiled against eager",
            status="note",
            **_apart(setup, data, batch, points, fast, _values(points, eager)),
        )
    with bench.guarded("compute type against float32"):
        if scale.compute == torch.float32:
            raise UnavailableError("it is float32")
        with _in_float32(policy):
            exact = _replay(setup, data, batch, points)
        bench.write(
            config=f"{scale.compute} against float32",
            status="note",
            **_apart(setup, data, batch, points, eager, _values(points, exact)),
        )


@torch.no_grad()
def _replay(setup: Setup, data: TrainSet, batch: MicroBatch, points: Points) -> Replay:
    found: Replay = setup.policy.root(data.replay_batch(setup, batch, points, want_logps=True))
    return found


def _gap(
    setup: Setup, data: TrainSet, batch: MicroBatch, points: Points, one: Replay, two: Replay
) -> Gap:
    """As the engine measures it."""
    objective, gap = setup.image_objective, Gap(setup.recipe.compute.precision)
    assert objective is not None
    assert one.velocities is not None
    assert two.velocities is not None
    width = one.logps.shape[1]
    gap.text(one.logps, data.logps[batch.rows, :width], data.mask[batch.rows, :width])
    gap.image(objective, points, one.velocities)
    gap.own(objective, points, one.velocities, two.velocities)
    return gap


def _values(points: Points, found: Replay) -> tuple[Tensor, Tensor]:
    """Log-probs, and the means of the transitions."""
    assert found.velocities is not None
    return found.logps, points.transition(found.velocities).mean


def _apart(
    setup: Setup,
    data: TrainSet,
    batch: MicroBatch,
    points: Points,
    found: Replay,
    other: tuple[Tensor, Tensor],
) -> dict[str, Any]:
    """How far two computations of a micro-batch are apart: |delta log p| of text, and the rms shift
    of the transition's mean, over its std and over the clip radius, per step of the window."""
    logps, mean = _values(points, found)
    width = min(logps.shape[1], other[0].shape[1])
    mask = data.mask[batch.rows, :width]
    text = (logps[:, :width] - other[0][:, :width]).abs()[mask]
    shift = (mean - other[1]).flatten(2).square().mean(2).sqrt()
    std = points.transition(torch.zeros_like(points.x_t)).std.flatten(2).mean(2)
    assert setup.image_objective is not None
    radii = shift / setup.image_objective.trust_radius(points)
    return {
        "text_mean": float(text.mean()),
        "text_max": float(text.max()),
        "image_over_std": (shift / std).amax(0).tolist(),
        "image_radii": radii.amax(0).tolist(),
        "radius_max": float(radii.max()),
    }


@contextmanager
def _in_float32(policy: BagelPolicy) -> Iterator[None]:
    """Computes in float32 with the same weights, which stay float32 after it."""
    policy.network.float()
    place, policy.root.compute = policy.place, torch.float32
    policy.place = replace(place, compute=torch.float32)
    try:
        yield
    finally:
        policy.place, policy.root.compute = place, place.compute
