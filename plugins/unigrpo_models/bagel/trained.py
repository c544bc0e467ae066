"""BAGEL's weights in training: whose they are, how they are saved and loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from unigrpo_core.plugin import Placement
from unigrpo_models.adapters import Lora
from unigrpo_models.bagel.checkpoint import open_weights, write_checkpoint
from unigrpo_models.bagel.layout import WEIGHTS, expert_of
from unigrpo_models.bagel.network import BagelNetwork
from unigrpo_models.reading import read_over
from unigrpo_models.stored import Stored
from unigrpo_models.trainable import Trainable, trained_whole


def type_of(name: str, place: Placement, lora: Lora | None) -> torch.dtype:
    """The type a weight is held in: float32 what is trained itself, and the tables."""
    whole = trained_whole(expert_of(name), place, lora)
    return torch.float32 if whole or "_pos_embed" in name else place.compute


class TrainedWeights(Trainable):
    """The weights of BAGEL, and the folder that they are of.

    Args:
        stored: the file they were read from (None: from none), which has what is not trained in
            its own type.
        folder: what else a checkpoint needs.
        base: what adapters call the model that they are of.

    Raises:
        UserError: a target of ``lora`` binds nothing.
    """

    network: BagelNetwork

    def __init__(
        self,
        network: BagelNetwork,
        stored: Stored | None,
        folder: Path,
        place: Placement,
        lora: Lora | None,
        base: str,
    ) -> None:
        super().__init__(network, expert_of, place, lora)
        self._stored, self._folder = stored, folder
        self._base = base

    def save(self, folder: Path) -> None:
        """Adapters in PEFT's layout, whole weights in the published one.

        Raises:
            OSError: the folder cannot be written.
        """
        if self.adapters is not None:
            self.adapters.save(folder, self._base)
            if not self.whole:
                return
        state = self.network.published()
        if self._stored is not None:
            trained = {n: p for n, p in self.network.named_parameters() if p.requires_grad}
            state = {name: p.detach() for name, p in trained.items() if ".lora_" not in name}
        write_checkpoint(folder, state, self._stored, self._folder)

    def load(self, folder: Path) -> None:
        """Takes over what :meth:`save` wrote.

        Raises:
            UserError: it is not there, damaged, of another model, or of other adapters.
        """
        adapted = self.load_adapters(folder, "lora_text, lora_image")
        if not adapted or (folder / WEIGHTS).exists():
            stored = open_weights(folder, self.network)
            read_over(stored, self.network.published())
            self._stored = stored
