"""A painter's network in training: what is trained of it, and how that is saved and loaded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from unigrpo_core.plugin import Placement
from unigrpo_models.adapters import Lora
from unigrpo_models.compiled import compile_units
from unigrpo_models.painters.painter import Painter
from unigrpo_models.reading import check_fit, read_over, shapes_of
from unigrpo_models.recompute import recomputed
from unigrpo_models.stored import Stored
from unigrpo_models.trainable import Trainable

PART = "transformer"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def image_owns(name: str) -> str:
    """Every part of the network is the image expert's."""
    return "image"


class PainterWeights(Trainable):
    """The weights of a painter's network, computed as the placement says.

    Raises:
        UserError: a target of ``lora`` binds nothing.
    """

    def __init__(self, painter: Painter, place: Placement, lora: Lora | None) -> None:
        network: Any = painter.network
        if place.compile:
            compile_units(painter.units())
        if place.checkpointing != "none":
            network.enable_gradient_checkpointing(partial(recomputed, place.checkpointing))
        super().__init__(network, image_owns, place, lora)
        self._folder = painter.folder

    def save(self, folder: Path) -> None:
        """Adapters in PEFT's layout, whole weights as a pipeline's component, in one file: nothing
        else of the pipeline has changed.

        Raises:
            OSError: the folder cannot be written.
        """
        if self.adapters is not None:
            self.adapters.save(folder, str(self._folder))
            return
        network: Any = self.network
        (folder / PART).mkdir(parents=True, exist_ok=True)
        network.save_pretrained(folder / PART, max_shard_size="100TB")

    def load(self, folder: Path) -> None:
        """Takes over what :meth:`save` wrote.

        Raises:
            UserError: it is not there, damaged, of another model, or of other adapters.
        """
        if self.load_adapters(folder, "lora_image"):
            return
        state = self.network.state_dict()
        stored = Stored(folder / PART / WEIGHTS)
        check_fit(stored, shapes_of(state), "is of another model")
        read_over(stored, state)
        stored.close()
