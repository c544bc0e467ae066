"""The options of the image flow policies."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from unigrpo_core.plugin import Field, HubPath, Options
from unigrpo_models.template import PROMPT, THOUGHT


class PainterOptions(Options):
    """What a painter is loaded by."""

    checkpoint: HubPath = Field(
        description="a pipeline's folder in diffusers' layout (a relative one counts from the "
        "recipe), pkg:PACKAGE/FOLDER for one that a package ships, or OWNER/NAME or "
        "OWNER/NAME@REVISION on the Hugging Face hub, if no such folder stands beside the recipe"
    )
    lora_rank: int = Field(
        0, ge=0, description="rank of adapters on the transformer; 0: all of it is trained"
    )
    lora_alpha: int | None = Field(
        None, gt=0, description="their scale is lora_alpha / lora_rank; twice the rank when absent"
    )
    lora_image: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="layers of the transformer with adapters, by the end of their path; those "
        "customary for the model when absent",
    )
    overlong: Literal["error", "cut"] = Field(
        "error",
        description="what becomes of a text longer than a text encoder reads: the run does not "
        "start, or the encoder reads its beginning, as in diffusers",
    )
    text_encoders: Literal["device", "host"] = Field(
        "device",
        description="where the text encoders wait for new texts: on the device, or in the host's "
        "memory, from which they are copied each time",
    )
    kept_texts: int = Field(
        2048, ge=1, description="texts whose embeddings are kept in the host's memory"
    )


class DrawingOptions(PainterOptions):
    """What a policy that only draws takes beside it."""

    template: str = Field(
        PROMPT, description="the text that is drawn; {prompt} stands for the prompt"
    )
    negative: str = Field(
        "", description='what guidance\'s branch "text" stands on; empty: the empty text'
    )

    @field_validator("template")
    @classmethod
    def _reads_the_prompt(cls, template: str) -> str:
        if PROMPT not in template or THOUGHT in template:
            raise ValueError(
                f"the template must have {PROMPT} and not {THOUGHT}, since nothing is thought; "
                f"got {template!r}"
            )
        return template


class SD3Options(DrawingOptions):
    text_encoder_3: bool = Field(
        True, description="whether T5 is loaded and read; without it the model sees zeros for it"
    )
    max_text_tokens: int = Field(256, ge=1, le=512, description="tokens that T5 reads, padding in")


class FluxOptions(DrawingOptions):
    max_text_tokens: int = Field(512, ge=1, le=512, description="tokens that T5 reads, padding in")
    embedded_guidance: float | None = Field(
        None,
        ge=0,
        description="the guidance scale that FLUX.1-dev takes as an input; 3.5 when absent",
    )


class SanaOptions(DrawingOptions):
    max_text_tokens: int = Field(
        300, ge=2, description="tokens that Gemma reads of a prompt, padding in"
    )
    instruction: bool = Field(
        True, description="whether the pipeline's request to enhance it stands before a prompt"
    )


class QwenImageOptions(DrawingOptions):
    max_text_tokens: int = Field(
        512, ge=1, le=1024, description="tokens read of a text, the 5 that close it and padding in"
    )
