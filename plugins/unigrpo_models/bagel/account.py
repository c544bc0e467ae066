"""BAGEL's side of ``unigrpo check --memory``: a workload as bytes, calls and FLOPs. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import Files, local_folder
from unigrpo_core.workload import Account, Workload
from unigrpo_models.bagel.account_memory import HeldMemory
from unigrpo_models.bagel.account_work import PhaseWork
from unigrpo_models.bagel.accounting import BOUNDARY
from unigrpo_models.bagel.config import BagelConfig, Latent
from unigrpo_models.bagel.counted import Adapters
from unigrpo_models.bagel.layout import CONFIG

if TYPE_CHECKING:
    from unigrpo_models.bagel.options import BagelOptions


def account(options: BagelOptions, load: Workload) -> Account:
    """What a training step of the workload takes.

    Raises:
        UserError: the checkpoint's configuration does not fit, or its images are of another size.
    """
    model, config, assumed = _config(options)
    latent, adapters = config.latent, _adapters(options)
    if load.images:
        _check(latent, load.size)
    held, phases = HeldMemory(config, adapters, load), PhaseWork(config, adapters, load)
    calls = load.calls(held.latents + BOUNDARY, latent.time_shift)
    beside = ("the autoencoder's passes",) if latent.space == "flux" else ()
    left = ", ".join((*beside, "rewards", "fragmentation", "the CUDA context"))
    thought = f"every thought has {load.max_tokens} tokens, the most; " if load.thoughts else ""
    bare = "; unconditional contexts are empty" if load.branches else ""
    return Account(
        model=model,
        memory=tuple(part for part in held.parts() if part.bytes),
        work={name: work for name, work in phases.phases(calls).items() if work.bytes},
        calls=calls,
        images=load.images,
        assumptions=(
            *assumed,
            f"{thought}a prompt takes {load.prompt_tokens}; nothing is shared between rows{bare}",
            f"not counted: {left}, evaluation",
        ),
    )


def _config(options: BagelOptions) -> tuple[str, BagelConfig, tuple[str, ...]]:
    """The model's name and sizes, and what has been assumed of them."""
    try:
        folder = local_folder("checkpoint", options.checkpoint, Files((CONFIG,)))
    except UserError:
        said = f"the sizes are the published model's, since {options.checkpoint} is not there yet"
        return "BAGEL-7B-MoT", BagelConfig.published(), (said,)
    return f"the checkpoint {options.checkpoint}", BagelConfig.read(folder), ()


def _adapters(options: BagelOptions) -> Adapters:
    named = {expert: getattr(options, f"lora_{expert}", ()) for expert in ("text", "image")}
    modules = {
        expert: tuple(name.split(".")[-1].removesuffix("_moe_gen") for name in names)
        for expert, names in named.items()
    }
    return Adapters(getattr(options, "lora_rank", 0), modules)


def _check(latent: Latent, size: tuple[int, int]) -> None:
    limit = latent.stride * latent.max_size
    for side in size:
        if side % latent.stride or side > limit:
            raise UserError(
                f"an image side of {side}: this model draws multiples of {latent.stride} pixels "
                f"up to {limit}"
            )
