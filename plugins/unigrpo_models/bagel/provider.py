"""The policy ``bagel`` as a plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import Field, Options, Placement, Provider
from unigrpo_models.checkpoints import CheckpointPath, checkpoint_folder

if TYPE_CHECKING:
    from unigrpo_core.workload import Account, Workload
    from unigrpo_models.bagel.policy import BagelPolicy


class BagelOptions(Options):
    checkpoint: CheckpointPath = Field(
        description="a folder in BAGEL's layout, or pkg:PACKAGE/FOLDER for one that a package ships"
    )
    system_prompt: str = Field("", description="put before every prompt; empty: none")


def build(options: BagelOptions, place: Placement) -> BagelPolicy:
    from unigrpo_models.bagel.policy import load_bagel

    return load_bagel(checkpoint_folder(options.checkpoint), options.system_prompt, place)


def notes(options: BagelOptions) -> Sequence[str]:
    try:
        folder = checkpoint_folder(options.checkpoint)
    except UserError as error:
        return (str(error),)
    weights = folder / "ema.safetensors"
    return () if weights.exists() else (f"the weights are not there yet: {weights}",)


def account(options: BagelOptions, load: Workload) -> Account:
    from unigrpo_models.bagel.account import account

    return account(options, load)


PROVIDER = Provider(
    name="bagel",
    build=build,
    options=BagelOptions,
    summary="BAGEL, a mixture of two transformers that writes and draws",
    cite="Deng et al. 2025, arXiv 2505.14683",
    provides=("text", "image", "branch:text"),
    notes=notes,
    account=account,
)
