"""Case 10: a reduced step through the engine itself."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import torch

from gpu_checks.harness import Bench, Entry, UnavailableError
from gpu_checks.scales import Scale
from unigrpo_core.catalog import Catalog, collect, load_catalog
from unigrpo_core.engine.clock import Clock
from unigrpo_core.engine.experience import gather
from unigrpo_core.engine.setup import Setup, build_setup
from unigrpo_core.engine.update import Updater
from unigrpo_core.recipe import load_recipe

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


def built(text: str) -> Setup:
    """The parts of a run of a recipe.

    Raises:
        UserError: they cannot be built.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "reduced.toml"
        file.write_text(text)
        return build_setup(load_recipe(file, catalog(), []))


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
    return built(text)


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
    two_steps(bench, reduced(bench, scale), f"2 x 4 chains, {scale.short} tokens")


def two_steps(bench: Bench, setup: Setup, name: str) -> None:
    """Two steps of the engine; of each the phases, the network's share in them, and what is left:
    the engine's overhead."""
    updater, policy = Updater(setup), setup.policy
    parts = Parts(setup.device)
    for method, part in (
        ("open", "prefill"),
        ("write", "decode"),
        ("velocity", "denoise"),
        ("decode", "pixels"),
    ):
        if hasattr(policy, method):
            parts.around(policy, method, part)
    parts.around(policy.root, "forward", "replay forward")
    parts.around(setup.accelerator, "backward", "replay backward")
    parts.around(updater.optimizer, "step", "optimizer")
    for number in (1, 2):
        bench.forget_peak()
        parts.clock.phases.clear()
        clock, start = Clock(setup.device), time.perf_counter()
        found = gather(setup, number, clock)
        sampled_gb = bench.peak_gb()
        with clock.phase("update"):
            metrics = updater(found.data)
        wall = time.perf_counter() - start
        network, samples = sum(parts.seconds.values()), len(found.scores.total)
        gaps = {name: value for name, value in metrics.items() if name.startswith("gap/")}
        extra = {
            "phases_s": clock.phases,
            "network_s": parts.seconds,
            "overhead_s": wall - network,
            "overhead_share": 1 - network / wall,
            "samples_per_s": samples / wall,
            "images_per_s": samples / clock.phases["image"],
            "updated_per_s": samples / clock.phases["update"],
            "rollout_gb": sampled_gb,
            "tokens": float(found.data.mask.sum()),
            **gaps,
        }
        bench.measured(
            Entry(f"{name}, step {number}", lambda: None, extra=extra),
            [1e3 * wall],
            bench.peak_gb(),
        )
