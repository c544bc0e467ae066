"""The policy ``bagel`` as a plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import Field, Options, Placement, Provider
from unigrpo_models.checkpoints import CheckpointPath, checkpoint_folder

if TYPE_CHECKING:
    from unigrpo_models.bagel.policy import BagelPolicy


class BagelOptions(Options):
    checkpoint: CheckpointPath = Field(
        description="a folder in BAGEL's layout, or pkg:PACKAGE/FOLDER for one that a package ships"
    )
    system_prompt: str = Field("", description="put before every prompt; empty: none")
    text_branch: Literal["system", "empty"] = Field(
        "system",
        description='what guidance\'s branch "text" stands on: what comes before the prompt, which '
        "is the system prompt, as BAGEL's inferencer does, or nothing, as its WISE script does",
    )
    look: Literal["vae_vit", "vit"] = Field(
        "vae_vit",
        description="what is read of an image that is looked at: latents and ViT, as for editing, "
        "or the ViT alone, as for understanding",
    )


def build(options: BagelOptions, place: Placement) -> BagelPolicy:
    from unigrpo_models.bagel.policy import load_bagel

    return load_bagel(
        checkpoint_folder(options.checkpoint),
        options.system_prompt,
        place,
        text_branch=options.text_branch,
        look=options.look,
    )


def notes(options: BagelOptions) -> Sequence[str]:
    try:
        folder = checkpoint_folder(options.checkpoint)
    except UserError as error:
        return (str(error),)
    weights = folder / "ema.safetensors"
    return () if weights.exists() else (f"the weights are not there yet: {weights}",)


PROVIDER = Provider(
    name="bagel",
    build=build,
    options=BagelOptions,
    summary="BAGEL, a mixture of two transformers that writes and draws",
    cite="Deng et al. 2025, arXiv 2505.14683",
    provides=("text", "image", "branch:text", "branch:image"),
    notes=notes,
)
