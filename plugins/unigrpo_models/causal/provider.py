"""The policy ``hf_causal_lm`` as a plugin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import Placement, Provider, fetched_folder, local_folder
from unigrpo_models.causal.files import FILES, check_chat, check_tokenizer, weight_files
from unigrpo_models.causal.options import CausalOptions

if TYPE_CHECKING:
    from unigrpo_core.workload import Account, Workload
    from unigrpo_models.causal.policy import CausalPolicy


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
