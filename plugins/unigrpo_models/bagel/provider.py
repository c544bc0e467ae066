"""The policy ``bagel`` as a plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import Field, Options, Placement, Provider
from unigrpo_models.bagel.layout import FILES, NEEDED, WEIGHTS
from unigrpo_models.checkpoints import HubCheckpoint, fetched_folder, local_folder

if TYPE_CHECKING:
    from unigrpo_models.bagel.policy import BagelPolicy


class BagelOptions(Options):
    checkpoint: HubCheckpoint = Field(
        description="a folder in BAGEL's layout (a relative one counts from the recipe), "
        "pkg:PACKAGE/FOLDER for one that a package ships, or OWNER/NAME or OWNER/NAME@REVISION on "
        "the Hugging Face hub, if no such folder stands beside the recipe"
    )
    system_prompt: str = Field("", description="put before every prompt; empty: none")


def build(options: BagelOptions, place: Placement) -> BagelPolicy:
    from unigrpo_models.bagel.policy import load_bagel

    folder = fetched_folder(options.checkpoint, NEEDED, FILES)
    return load_bagel(folder, options.system_prompt, place)


def notes(options: BagelOptions) -> Sequence[str]:
    from unigrpo_models.bagel.config import BagelConfig
    from unigrpo_models.stored import Stored

    try:
        folder = local_folder(options.checkpoint, NEEDED)
        BagelConfig.read(folder)
        if (folder / WEIGHTS).exists():
            Stored(folder / WEIGHTS).close()
            return ()
    except UserError as error:
        return (str(error),)
    return (f"the weights are not there yet: {folder / WEIGHTS}",)


PROVIDER = Provider(
    name="bagel",
    build=build,
    options=BagelOptions,
    summary="BAGEL, a mixture of two transformers that writes and draws",
    cite="Deng et al. 2025, arXiv 2505.14683",
    provides=("text", "image", "branch:text"),
    notes=notes,
)
