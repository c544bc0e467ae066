"""The methods of the paper and their alternatives, one file each; light until one is used."""

from __future__ import annotations

from collections.abc import Iterator

from unigrpo_core.plugin import Provider, hookimpl
from unigrpo_methods.advantages import gdpo, group_norm, leave_one_out
from unigrpo_methods.guidance import cfg, none
from unigrpo_methods.objectives import (
    awm,
    cispo,
    dapo,
    diffusion_nft,
    dr_grpo,
    flow_dppo,
    flow_grpo,
    fpo,
    grpo,
    grpo_guard,
    gspo,
    refl,
    tempflow,
)
from unigrpo_methods.regularizers import entropy, latent_kl, text_kl, velocity_mse
from unigrpo_methods.schedulers import cps, dance_sde, flow_sde, ode
from unigrpo_methods.windows import fixed, random, scattered, sliding, whole


@hookimpl
def unigrpo_text_objectives() -> Iterator[Provider]:
    yield grpo.PROVIDER
    yield dr_grpo.PROVIDER
    yield dapo.PROVIDER
    yield gspo.PROVIDER
    yield cispo.PROVIDER


@hookimpl
def unigrpo_image_objectives() -> Iterator[Provider]:
    yield flow_grpo.PROVIDER
    yield diffusion_nft.PROVIDER
    yield awm.PROVIDER
    yield fpo.PROVIDER
    yield refl.PROVIDER
    yield grpo_guard.PROVIDER
    yield tempflow.PROVIDER
    yield flow_dppo.PROVIDER


@hookimpl
def unigrpo_schedulers() -> Iterator[Provider]:
    yield flow_sde.PROVIDER
    yield dance_sde.PROVIDER
    yield cps.PROVIDER
    yield ode.PROVIDER


@hookimpl
def unigrpo_windows() -> Iterator[Provider]:
    yield fixed.PROVIDER
    yield random.PROVIDER
    yield sliding.PROVIDER
    yield scattered.PROVIDER
    yield whole.PROVIDER


@hookimpl
def unigrpo_guidance() -> Iterator[Provider]:
    yield none.PROVIDER
    yield cfg.PROVIDER


@hookimpl
def unigrpo_regularizers() -> Iterator[Provider]:
    yield velocity_mse.PROVIDER
    yield latent_kl.PROVIDER
    yield text_kl.PROVIDER
    yield entropy.PROVIDER


@hookimpl
def unigrpo_advantages() -> Iterator[Provider]:
    yield group_norm.PROVIDER
    yield leave_one_out.PROVIDER
    yield gdpo.PROVIDER
