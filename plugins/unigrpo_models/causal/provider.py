"""The policy ``hf_causal_lm`` as a plugin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

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
from unigrpo_models.causal.files import FILES, check_chat, check_tokenizer, weight_files

if TYPE_CHECKING:
    from unigrpo_core.workload import Account, Workload
    from unigrpo_models.causal.policy import CausalPolicy

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


def build(options: CausalOptions, place: Placement) -> CausalPolicy:
    from unigrpo_models.adapters import Lora
    from unigrpo_models.causal.policy import load_causal
    from unigrpo_models.causal.tokens import Style

    lora = None
    if options.lora_rank:
        alpha = options.lora_alpha or 2 * options.lora_rank
        lora = Lora(options.lora_rank, alpha, {"text": options.lora_text})
    style = Style(
        system_prompt=options.system_prompt,
        chat=options.chat,
        open=options.open,
        close=options.close,
        enable_thinking=options.enable_thinking,
    )
    if options.eager:
        place = replace(place, compile=False)
    folder = fetched_folder("checkpoint", options.checkpoint, FILES)
    return load_causal(folder, style, place, lora=lora, name=options.checkpoint)


def notes(options: CausalOptions) -> Sequence[str]:
    try:
        folder = local_folder("checkpoint", options.checkpoint, FILES)
    except UserError as error:
        return (str(error),)
    checks = [weight_files, check_tokenizer, *([check_chat] if options.chat else [])]
    return tuple(filter(None, (_fault(check, folder) for check in checks)))


def _fault(check: Callable[[Path], object], folder: Path) -> str:
    try:
        check(folder)
    except UserError as error:
        return str(error)
    return ""


def account(options: CausalOptions, load: Workload) -> Account | str:
    from unigrpo_models.causal.account import account

    return account(options, load)


PROVIDER = Provider(
    name="hf_causal_lm",
    build=build,
    options=CausalOptions,
    summary="any causal language model of transformers, by folder or hub id; it writes",
    cite="Wolf et al. 2020, arXiv 1910.03771",
    provides=("text",),
    notes=notes,
    account=account,
)
