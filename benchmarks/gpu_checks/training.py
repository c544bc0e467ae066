"""Cases 5 to 9: replay forwards and backwards, the reference, the optimizer, the autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from unigrpo_models.bagel.accounting import OPTIMIZER_BYTES, Work, replay
from unigrpo_models.bagel.policy import BagelPolicy

from gpu_checks import attention
from gpu_checks.harness import Bench, Entry, Pace, UnavailableError
from gpu_checks.models import (
    EXPERTS,
    Compiled,
    checkpointing,
    random_policy,
    replay_batch,
    trained,
)
from gpu_checks.scales import Scale
from unigrpo_core.records import ReplayBatch

MODES = ("none", "selective", "full")
CHUNK = 2**26  # parameters of one tensor of the optimizer's case


def work_of(scale: Scale, rows: int, size: str, *, scored: bool = True, **what: object) -> Work:
    """Of a replay of so many chains."""
    return replay(
        scale.config,
        rows,
        scale.context,
        scale.window,
        scale.latent_tokens(size),
        scored=rows * (scale.thought - 1) if scored else 0,
        itemsize=scale.compute.itemsize,
        **what,
    )


def replay_forward(bench: Bench, scale: Scale) -> None:
    """Milliseconds of one chain."""
    attention.layer(bench, scale)
    policy = random_policy(scale, bench.device)
    compiled = None
    with bench.guarded("compiled"):
        compiled = Compiled(policy)
    for size, counts in scale.chains.items():
        for count in sorted({counts[0], counts[-1]}):
            run = _forward(policy, replay_batch(policy, scale, count, size))
            work, phase = work_of(scale, count, size), f"forward/{size}"
            entries = [Entry(f"{size}, {count} chains, eager", run, work, count, phase)]
            if compiled is not None and count == counts[-1]:
                faster = partial(compiled, run)
                name = f"{size}, {count} chains, compiled"
                entries.append(Entry(name, faster, work, count, phase))
            bench.race(*entries, pace=_few(bench.pace))


def _forward(policy: BagelPolicy, batch: ReplayBatch) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return policy.root(batch)

    return run


def update(bench: Bench, scale: Scale) -> None:
    """Milliseconds of one chain forward and backward. The share counts no recomputation;
    ``flop_done`` does."""
    whole = EXPERTS if not scale.lora_rank else frozenset({"image"})
    name = "both experts" if whole == EXPERTS else "image expert"
    _update(bench, scale, name, whole, 0)
    if scale.lora_rank:
        with bench.guarded("adapters"):
            _update(bench, scale, "adapters", EXPERTS, scale.lora_rank)


def _update(bench: Bench, scale: Scale, name: str, train: frozenset[str], rank: int) -> None:
    policy = random_policy(scale, bench.device, train=train, rank=rank)
    lora = train if rank else frozenset()
    for size, counts in scale.chains.items():
        for count in counts:
            batch = replay_batch(policy, scale, count, size)
            work = work_of(scale, count, size, train=train, lora=lora)
            for mode in MODES:
                title = f"{name}, {size}, {count} chains, recompute {mode}"
                with bench.guarded(title):
                    checkpointing(policy, mode)
                    done = work_of(
                        scale, count, size, train=train, lora=lora, recompute=mode == "full"
                    )
                    extra = {"flop_done": done.flops / count}
                    # One expert alone is no step of the method, so it is not projected.
                    phase = f"update/{size}" if train == EXPERTS else ""
                    run = partial(_both_ways, policy, batch)
                    bench.race(Entry(title, run, work, count, phase, extra), pace=_few(bench.pace))


def _both_ways(policy: BagelPolicy, batch: ReplayBatch) -> None:
    found = policy.root(batch)
    (found.velocities.square().mean() - found.logps.sum() / found.logps.numel()).backward()
    for parameter in trained(policy):
        parameter.grad = None


def reference(bench: Bench, scale: Scale) -> None:
    """Milliseconds of one chain by the reference, whose logits nobody asks for."""
    policy = random_policy(scale, bench.device, train=EXPERTS, rank=scale.lora_rank)
    policy.keep("reference")
    for size, counts in scale.chains.items():
        count = counts[-1]
        batch = replay_batch(policy, scale, count, size, scored=False)

        def run(batch: ReplayBatch = batch) -> None:
            with policy.weights("reference"):
                policy.root(batch)

        work = work_of(scale, count, size, scored=False)
        phase = f"reference/{size}"
        bench.race(Entry(f"{size}, {count} chains", run, work, count, phase), pace=_few(bench.pace))


def optimizer(bench: Bench, scale: Scale) -> None:
    """A clipped step of fused AdamW, as the engine makes it. The floor counts a bf16 copy of the
    weights too, which whoever computes in bf16 needs."""
    sizes = [min(CHUNK, scale.moved - start) for start in range(0, scale.moved, CHUNK)]
    parameters = [nn.Parameter(torch.randn(size, device=bench.device)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    adam = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def run() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()

    work = Work(0.0, float(OPTIMIZER_BYTES * scale.moved))
    name = f"AdamW and clipping, {scale.moved:.3g} parameters"
    bench.race(Entry(name, run, work, phase="optimizer"))


def autoencoder(bench: Bench, scale: Scale) -> None:
    """Milliseconds of one image, and the PSNR of its pixels against those in float32."""
    try:
        from unigrpo_models.bagel.autoencoder import Autoencoder, Sizes
    except ImportError as error:
        raise UnavailableError("this version of the package has no autoencoder") from error
    widths = (128, 256, 512, 512) if bench.cuda else (32, 32, 32, 32)
    built = Autoencoder(Sizes(widths[0], widths, 2 if bench.cuda else 1, 16))
    built = built.to(bench.device).requires_grad_(False)
    for size, (height, width) in scale.sizes.items():
        latents = torch.randn(1, 16, height // 8, width // 8, device=bench.device)
        with torch.no_grad():
            exact = built.decode(latents)
        work = Work(_counted(lambda latents=latents: built.decode(latents)))
        kinds = [("float32", torch.float32, False)]
        if bench.cuda:
            kinds += [("TF32", torch.float32, True), ("bf16", torch.bfloat16, True)]
        for name, dtype, coarse in kinds:
            run = partial(_decoded, built.to(dtype), latents, coarse)
            extra = {"psnr_db": psnr(run(), exact)}
            # The policy decodes in float32.
            phase = f"autoencoder/{size}" if name == "float32" else ""
            bench.race(Entry(f"{size}, {name}", run, work, 1, phase, extra))
        built.to(torch.float32)


@torch.no_grad()
def _decoded(built: nn.Module, latents: Tensor, coarse: bool) -> Tensor:
    """Decoded with or without TF32, whatever was set before."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = coarse
    try:
        images: Tensor = built.decode(latents)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    return images


def psnr(image: Tensor, exact: Tensor) -> float | None:
    """Decibels, of images in [-1, 1]; None if they are equal."""
    error = float((image - exact).double().square().mean())
    return None if error == 0 else float(10 * torch.tensor(4.0 / error).log10())


def _counted(run: Callable[[], object]) -> float:
    """FLOPs as torch counts them: of convolutions, which the package's accounting has not."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def _few(pace: Pace) -> Pace:
    return Pace(min(2, pace.warm), min(3, pace.least), pace.seconds / 2)
