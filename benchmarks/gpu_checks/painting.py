"""Case 12: Stable Diffusion 3.5 Medium by the calls that the engine makes, and steps of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from unigrpo_models.painters.counted import SD3, Config, Shapes, Tokens
from unigrpo_models.painters.policy import PainterPolicy

from gpu_checks.engine import built, two_steps
from gpu_checks.harness import Bench, Entry, Pace, UnavailableError
from gpu_checks.models import prompts, trained
from gpu_checks.rows import Work
from gpu_checks.scales import Painted, Scale
from unigrpo_core.plugin import Placement
from unigrpo_core.records import ReplayBatch

MODES = ("none", "selective", "full")
RECIPE = """\
title = "a painter's step"
steps = 2
prompts = 2
episode = ["draw"]
train = ["image"]
group = {{ fan_out = [{group}] }}
updates = {{ count = 2, data = "disjoint" }}
source = {{ use = "board" }}
rewards = [{{ use = "random" }}]
advantage = {{ use = "group_norm" }}
policy = {{ use = "random_sd3", scale = "{scale}" }}

[image]
lr = 3e-4
size = [{height}, {width}]
noise_scope = "episode"
objective = {{ use = "flow_grpo", clip_range = 1e-4 }}
scheduler = {{ use = "flow_sde", steps = {steps}, noise_level = 0.7, grid = "diffusers" }}
window = {{ use = "fixed", steps = {window} }}
guidance = {guidance}
regularizers = [{{ use = "latent_kl", weight = 1e-3 }}]

[evaluation]
prompts = 1
final_prompts = 1
sheet = 0
scheduler = {{ use = "ode", steps = {steps} }}
guidance = {{ use = "none" }}

[compute]
device = "{device}"
precision = "{precision}"
checkpointing = "selective"
rollout_images = 24
replay_tokens = {budget}
"""
GUIDANCE = {
    "no guidance": '{ use = "none" }',
    "guidance 4.5": '{ use = "cfg", scale = 4.5 }',
}


def sd3(bench: Bench, scale: Scale) -> None:
    """Milliseconds of one image in one step, and of one trained point; then steps of the engine.

    Raises:
        UnavailableError: diffusers is missing.
    """
    if find_spec("diffusers") is None:
        raise UnavailableError('diffusers is missing: pip install "unigrpo[diffusers]"')
    with bench.guarded("denoise"):
        _denoise(bench, scale)
    with bench.guarded("update"):
        _update(bench, scale)
    for name, guidance in GUIDANCE.items():
        with bench.guarded(name):
            two_steps(
                bench, built(_recipe(bench, scale, guidance)), f"2 x {_images(scale)}, {name}"
            )


def _images(scale: Scale) -> str:
    height, width = scale.painter.size
    return f"{scale.painter.group} images of {height} x {width}"


class Counted:
    """Work of one image at one time; the weights are read once a call."""

    def __init__(self, policy: PainterPolicy, painted: Painted, itemsize: int) -> None:
        network = policy.painter.network
        self.config: Config = painted.transformer
        self.shapes: Shapes = {
            name.replace(".base_layer", ""): tuple(x.shape)
            for name, x in network.named_parameters()
            if ".lora_" not in name
        }
        text = sum(painted.text)
        self.each = Tokens(policy.image_tokens(painted.size) - text, text)
        self.bytes = itemsize * sum(x.numel() for x in network.parameters())

    def forward(self, images: int) -> Work:
        return Work(images * SD3.forward(self.shapes, self.config, self.each), self.bytes)

    def training(self, points: int, *, recompute: bool = False) -> Work:
        """Of adapters."""
        flops = SD3.training(self.shapes, self.config, self.each, adapted=True, recompute=recompute)
        return Work(points * flops, 2.0 * self.bytes)


def _denoise(bench: Bench, scale: Scale) -> None:
    painted = scale.painter
    policy = _policy(bench, scale, frozenset(), "none")
    counted = Counted(policy, painted, scale.compute.itemsize)
    for count in painted.images:
        history = policy.open(prompts(scale, count))
        x = torch.randn(count, *policy.latent_shape(painted.size), device=bench.device)
        run = partial(policy.velocity, history, x, torch.full((count,), 0.8, device=bench.device))
        bench.race(
            Entry(f"velocity, B {count}", run, counted.forward(count), count), pace=_few(bench.pace)
        )


def _update(bench: Bench, scale: Scale) -> None:
    """One image with all points of its window, as ``replay_tokens`` of the recipe cuts them. The
    share counts no recomputation; ``flop_done`` that of "full"."""
    for mode in MODES:
        title = f"update, {len(scale.painter.window)} points, recompute {mode}"
        with bench.guarded(title):
            policy = _policy(bench, scale, frozenset({"image"}), mode)
            counted = Counted(policy, scale.painter, scale.compute.itemsize)
            points = len(scale.painter.window)
            done = counted.training(points, recompute=mode == "full").flops / points
            run, work = _both_ways(policy, _batch(policy, scale)), counted.training(points)
            extra = {"flop_done": done}
            bench.race(Entry(title, run, work, points, extra=extra), pace=_few(bench.pace))
            del policy, run


def _policy(bench: Bench, scale: Scale, train: frozenset[str], mode: str) -> PainterPolicy:
    from gpu_checks.random_sd3 import random_sd3

    return random_sd3(scale, Placement(bench.device, scale.compute, train, checkpointing=mode))


def _batch(policy: PainterPolicy, scale: Scale) -> ReplayBatch:
    points, device = len(scale.painter.window), policy.painter.place.device
    nothing = torch.zeros(1, 0, dtype=torch.int64, device=device)
    return ReplayBatch(
        prompts=prompts(scale, 1),
        tokens=nothing,
        mask=nothing.bool(),
        temperature=1.0,
        want_logps=False,
        x_t=torch.randn(1, points, *policy.latent_shape(scale.painter.size), device=device),
        t=torch.linspace(0.9, 0.3, points, device=device)[None],
        branches=(),
        context_gradient=True,
    )


def _both_ways(policy: PainterPolicy, batch: ReplayBatch) -> Callable[[], None]:
    moved = trained(policy)

    def run() -> None:
        policy.root(batch).velocities.square().mean().backward()
        for parameter in moved:
            parameter.grad = None

    return run


def _recipe(bench: Bench, scale: Scale, guidance: str) -> str:
    painted = scale.painter
    stride = 2 ** len(painted.autoencoder["block_out_channels"])  # of a patch of 2 latents
    height, width = painted.size
    tokens = height * width // stride**2 + sum(painted.text)
    return RECIPE.format(
        group=painted.group,
        scale=scale.name,
        height=height,
        width=width,
        steps=painted.steps,
        window=list(painted.window),
        guidance=guidance,
        device=bench.device,
        precision="bf16" if scale.compute == torch.bfloat16 else "float32",
        budget=(len(painted.window) + 1) * tokens,  # an image with its points
    )


def _few(pace: Pace) -> Pace:
    return Pace(min(2, pace.warm), min(3, pace.least), pace.seconds / 2)
