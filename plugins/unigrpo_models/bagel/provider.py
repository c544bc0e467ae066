"""The policy ``bagel`` as a plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import (
    Field,
    HubPath,
    Options,
    Placement,
    Provider,
    fetched_folder,
    local_folder,
)
from unigrpo_models.bagel.layout import FILES

if TYPE_CHECKING:
    from unigrpo_core.workload import Account, Workload
    from unigrpo_models.bagel.policy import BagelPolicy


PROJECTIONS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)


class BagelOptions(Options):
    checkpoint: HubPath = Field(
        description="a folder in BAGEL's layout (a relative one counts from the recipe), "
        "pkg:PACKAGE/FOLDER for one that a package ships, or OWNER/NAME or OWNER/NAME@REVISION on "
        "the Hugging Face hub, if no such folder stands beside the recipe"
    )
    system_prompt: str = Field("", description="put before every prompt; empty: none")
    lora_rank: int = Field(
        0, ge=0, description="rank of adapters on the trained experts; 0: whole experts are trained"
    )
    lora_alpha: int | None = Field(
        None, gt=0, description="their scale is lora_alpha / lora_rank; twice the rank when absent"
    )
    lora_text: tuple[str, ...] = Field(
        PROJECTIONS,
        description="layers of the text expert with adapters, by the end of their path; none: it "
        "is trained whole",
    )
    lora_image: tuple[str, ...] = Field(
        PROJECTIONS,
        description="layers of the image expert with adapters (the suffix _moe_gen may be left "
        "out); none: it is trained whole",
    )
    text_branch: Literal["system", "empty"] = Field(
        "system",
        description='what guidance\'s branch "text" stands on: what comes before the prompt, which '
        "is the system prompt, as BAGEL's inferencer does, or nothing, as its WISE script does",
    )
    autoencoder: Literal["float32", "bf16"] = Field(
        "float32",
        description="the type that pixels are decoded in; bf16 is faster, and changes pixels by "
        "about 1 %",
    )
    look: Literal["vae_vit", "vit"] = Field(
        "vae_vit",
        description="what is read of an image that is looked at: latents and ViT, as for editing, "
        "or the ViT alone, as for understanding",
    )


def build(options: BagelOptions, place: Placement) -> BagelPolicy:
    import torch

    from unigrpo_models.adapters import Lora
    from unigrpo_models.bagel.policy import load_bagel

    lora = None
    if options.lora_rank:
        alpha = options.lora_alpha or 2 * options.lora_rank
        lora = Lora(options.lora_rank, alpha, _targets(options))
    return load_bagel(
        fetched_folder("checkpoint", options.checkpoint, FILES),
        options.system_prompt,
        place,
        lora=lora,
        text_branch=options.text_branch,
        look=options.look,
        pixels=torch.bfloat16 if options.autoencoder == "bf16" else torch.float32,
        name=options.checkpoint,
    )


def _targets(options: BagelOptions) -> dict[str, tuple[str, ...]]:
    """The layers of each expert that get adapters; an expert that is trained whole has none."""
    asked = {"text": options.lora_text, "image": options.lora_image}
    return {expert: names for expert, names in asked.items() if names}


def notes(options: BagelOptions) -> Sequence[str]:
    from unigrpo_models.bagel.preflight import preflight

    try:
        folder = local_folder("checkpoint", options.checkpoint, FILES)
        return tuple(preflight(folder, _targets(options) if options.lora_rank else {}))
    except UserError as error:
        return (str(error),)


def account(options: BagelOptions, load: Workload) -> Account:
    from unigrpo_models.bagel.account import account

    return account(options, load)


PROVIDER = Provider(
    name="bagel",
    build=build,
    options=BagelOptions,
    summary="BAGEL, a mixture of two transformers that writes and draws",
    cite="Deng et al. 2025, arXiv 2505.14683",
    provides=("text", "image", "branch:text", "branch:image"),
    notes=notes,
    account=account,
)
