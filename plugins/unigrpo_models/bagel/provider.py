"""The policy ``bagel`` as a plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import Placement, Provider, fetched_folder, local_folder
from unigrpo_models.bagel.layout import FILES
from unigrpo_models.bagel.options import BagelOptions

if TYPE_CHECKING:
    from unigrpo_core.workload import Account, Workload
    from unigrpo_models.bagel.policy import BagelPolicy


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
