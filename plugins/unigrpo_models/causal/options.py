"""The options of the policy ``hf_causal_lm``."""

from __future__ import annotations

from unigrpo_core.plugin import Field, HubPath, Options

PROJECTIONS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)


class CausalOptions(Options):
    checkpoint: HubPath = Field(
        description="a folder that save_pretrained wrote (a relative one counts from the recipe), "
        "pkg:PACKAGE/FOLDER for one that a package ships, or OWNER/NAME or OWNER/NAME@REVISION on "
        "the Hugging Face hub, if no such folder stands beside the recipe"
    )
    system_prompt: str = Field(
        "",
        description="the chat's system message, or without a chat what stands before every prompt; "
        "empty: none (a chat template may have one of its own)",
    )
    chat: bool = Field(
        True,
        description="whether a prompt is the user's turn in the tokenizer's chat template; false: "
        "system_prompt, prompt and open one after the other, as they stand",
    )
    open: str = Field(
        "",
        description='the beginning of every text, given and not sampled, such as "<think>\\n"; it '
        "is no part of the thought that rewards read",
    )
    close: str = Field(
        "",
        description="a text that ends a thought as the model's own end does, one token of its "
        'tokenizer, such as "</think>"; empty: none',
    )
    enable_thinking: bool | None = Field(
        None,
        description="what the chat template is told under this name, if it knows it, as Qwen3's "
        "does; absent: nothing",
    )
    eager: bool = Field(
        False,
        description="whether this model computes as it is though compute.compile is true, which in "
        "a pair is then the painter's alone; by default it refuses, since it is not compiled",
    )
    lora_rank: int = Field(
        0, ge=0, description="rank of adapters on the layers below; 0: the whole model is trained"
    )
    lora_alpha: int | None = Field(
        None, gt=0, description="their scale is lora_alpha / lora_rank; twice the rank when absent"
    )
    lora_text: tuple[str, ...] = Field(
        PROJECTIONS,
        min_length=1,
        description="layers with adapters, by the end of their path",
    )
