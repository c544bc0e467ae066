"""The options of the policy ``bagel``."""

from __future__ import annotations

from typing import Literal

from unigrpo_core.plugin import Field, HubPath, Options

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
