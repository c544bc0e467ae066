"""Cases 10 and 11: a reduced step through the engine itself, and law 3's gaps."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from unigrpo_models.bagel.policy import BagelPolicy

from gpu_checks.harness import Bench, Entry, UnavailableError
from gpu_checks.models import Compiled
from gpu_checks.scales import Scale
from unigrpo_core.catalog import Catalog, collect, load_catalog
from unigrpo_core.engine.clock import Clock
from unigrpo_core.engine.experience import gather
from unigrpo_core.engine.gap import Gap
from unigrpo_core.engine.setup import Setup, build_setup
from unigrpo_core.engine.trainset import MicroBatch, TrainSet
from unigrpo_core.engine.update import Updater
from unigrpo_core.recipe import load_recipe
from unigrpo_core.records import Points, Replay

RECIPE = """\
title = "a reduced step"
steps = 2
prompts = 2
group = {{ fan_out = [4, 1] }}
updates = {{ count = 2, data = "disjoint" }}
source = {{ use = "board" }}
rewards = [{{ use = "random" }}]
advantage = {{ use = "group_norm" }}
policy = {{ use = "random_bagel", scale = "{scale}", lora_rank = {rank} }}

[text]
lr = 1e-6
max_tokens = {tokens}
objective = {{ use = "grpo" }}

[image]
lr = 1e-6
size = [{height}, {width}]
objective = {{ use = "flow_grpo", ratio_norm = true }}
scheduler = {{ use = "flow_sde", steps = 8, noise_level = 0.8 }}
window = {{ use = "fixed", steps = {window} }}
guidance = {{ use = "none" }}
regularizers = [{{ use = "velocity_mse", weight = 0.01 }}]

[evaluation]
prompts = 1
final_prompts = 1
sheet = 0
scheduler = {{ use = "ode", steps = 8 }}
guidance = {{ use = "none" }}

[compute]
device = "{device}"
precision = "{precision}"
replay_tokens = {budget}
"""


def catalog() -> Catalog:
    """What is installed, and the random models."""
    installed = load_catalog()
    mine = collect([(EntryPoint("models", "gpu_checks.models", "unigrpo"), "gpu-check", "0")])
    return Catalog(installed.components + mine.components, installed.broken + mine.broken)


def reduced(bench: Bench, scale: Scale) -> Setup:
    """The parts of a run of 2 prompts x 4 chains with short thoughts and small images.

    Raises:
        UnavailableError: the model needs adapters, and the package has none.
    """
    height, width = scale.sizes["small"]
    text = RECIPE.format(
        scale=scale.name,
        rank=scale.lora_rank,
        tokens=scale.short,
        height=height,
        width=width,
        window=list(range(scale.window)),
        budget=scale.context + scale.window * (scale.latent_tokens("small") + 2),  # one chain
        device=bench.device,
        precision="bf16" if scale.compute == torch.bfloat16 else "float32",
    )
    if scale.lora_rank:
        try:
            import unigrpo_models.adapters  # noqa: F401
        except ImportError as error:
            raise UnavailableError("this version of the package has no adapters") from error
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "reduced.toml"
        file.write_text(text)
        return build_setup(load_recipe(file, catalog(), []))


class Parts:
    """Seconds inside the network's calls, by name, each waited for at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.clock = Clock(device)

    def around(self, owner: Any, method: str, name: str) -> None:
        """From now on the owner's calls of this method are timed."""
        plain: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.clock.phase(name):
                return plain(*args, **kwargs)

        setattr(owner, method, timed)

    @property
    def seconds(self) -> dict[str, float]:
        return dict(self.clock.phases)


def step(bench: Bench, scale: Scale) -> None:
    """Two steps of the engine; of each the phases, the network's share in them, and what is left:
    the engine's overhead."""
    setup = reduced(bench, scale)
    updater, policy = Updater(setup), setup.policy
    parts = Parts(setup.device)
    for method, name in (
        ("open", "prefill"),
        ("write", "decode"),
        ("velocity", "denoise"),
        ("decode", "pixels"),
    ):
        parts.around(policy, method, name)
    parts.around(policy.root, "forward", "replay forward")
    parts.around(setup.accelerator, "backward", "replay backward")
    parts.around(updater.optimizer, "step", "optimizer")
    for number in (1, 2):
        bench.forget_peak()
        parts.clock.phases.clear()
        clock, start = Clock(setup.device), time.perf_counter()
        found = gather(setup, number, clock)
        with clock.phase("update"):
            metrics = updater(found.data)
        wall = time.perf_counter() - start
        network = sum(parts.seconds.values())
        gaps = {name: value for name, value in metrics.items() if name.startswith("gap/")}
        extra = {
            "phases_s": clock.phases,
            "network_s": parts.seconds,
            "overhead_s": wall - network,
            "overhead_share": 1 - network / wall,
            "samples_per_s": len(found.scores.total) / wall,
            "tokens": float(found.data.mask.sum()),
            **gaps,
        }
        bench.measured(
            Entry(f"2 x 4 chains, {scale.short} tokens, step {number}", lambda: None, extra=extra),
            [1e3 * wall],
            bench.peak_gb(),
        )


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
