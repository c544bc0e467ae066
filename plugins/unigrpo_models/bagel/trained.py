"""BAGEL's weights in training: whose they are, what is trained, kept, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import Placement
from unigrpo_models.adapters import CONFIG as ADAPTERS
from unigrpo_models.adapters import Adapters, Lora
from unigrpo_models.bagel.checkpoint import open_weights, write_checkpoint
from unigrpo_models.bagel.layout import WEIGHTS
from unigrpo_models.bagel.network import BagelNetwork
from unigrpo_models.reading import read_over
from unigrpo_models.stored import Stored
from unigrpo_models.weights import WeightSets

FROZEN = ("_pos_embed", "vit_model.", "connector.")
"""What no expert owns: the position tables, and what only reads images."""
IMAGE = ("_moe_gen", "time_embedder", "vae2llm", "llm2vae")


def expert_of(name: str) -> str | None:
    """The expert that owns a parameter or a module, by its path; None for what no one trains."""
    if any(part in name for part in FROZEN):
        return None
    return "image" if any(part in name for part in IMAGE) else "text"


def type_of(name: str, place: Placement, lora: Lora | None) -> torch.dtype:
    """The type a weight is held in: float32 what is trained itself, and the tables."""
    adapted = () if lora is None else lora.targets
    whole = expert_of(name) in place.train and expert_of(name) not in adapted
    return torch.float32 if whole or "_pos_embed" in name else place.compute


class TrainedWeights:
    """The weights of a network: of each expert that is trained all of them, or its adapters.

    Args:
        stored: the file they were read from (None: from none), which has what is not trained in
            its own type.
        folder: what else a checkpoint needs.

    Raises:
        UserError: a target of ``lora`` binds nothing.
    """

    def __init__(
        self,
        network: BagelNetwork,
        stored: Stored | None,
        folder: Path,
        place: Placement,
        lora: Lora | None,
    ) -> None:
        self._network, self._stored, self._folder, self._place = network, stored, folder, place
        targets = {} if lora is None else lora.targets
        adapted = {expert: names for expert, names in targets.items() if expert in place.train}
        self._whole = place.train - adapted.keys()
        self._adapters: Adapters | None = None
        if lora is not None and adapted:
            self._adapters = Adapters.of(network, replace(lora, targets=adapted), expert_of)
        for name, parameter in network.named_parameters():
            expert = expert_of(name)
            adapter = expert in adapted and ".lora_" in name
            parameter.requires_grad_(expert in self._whole or adapter)
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._sets = WeightSets(trained, host=place.reference == "host")
        self._bare: set[str] = set()  # what was kept while the adapters changed nothing

    def parameters(self, root: nn.Module) -> Mapping[str, Mapping[str, nn.Parameter]]:
        """Those of each expert, by their name in the root that holds the network."""
        experts: dict[str, dict[str, nn.Parameter]] = {"text": {}, "image": {}}
        for name, parameter in root.named_parameters():
            expert = expert_of(name)
            if expert is not None:
                experts[expert][name] = parameter
        return experts

    def keep(self, name: str) -> None:
        if self._adapters is not None and not self._whole and self._adapters.fresh:
            self._bare.add(name)
        else:
            self._bare.discard(name)
            self._sets.keep(name)

    def use(self, name: str) -> AbstractContextManager[None]:
        """Computes with the weights kept under ``name``, without gradient."""
        if self._adapters is not None and name in self._bare:
            return self._adapters.off()
        return self._sets.use(name)

    def save(self, folder: Path) -> None:
        """Adapters in PEFT's layout, whole weights in the published one.

        Raises:
            OSError: the folder cannot be written.
        """
        if self._adapters is not None:
            self._adapters.save(folder, str(self._folder))
            if not self._whole:
                return
        state = self._network.published()
        if self._stored is not None:
            trained = {n: p for n, p in self._network.named_parameters() if p.requires_grad}
            state = {name: p.detach() for name, p in trained.items() if ".lora_" not in name}
        write_checkpoint(folder, state, self._stored, self._folder)

    def load(self, folder: Path) -> None:
        """Takes over what :meth:`save` wrote.

        Raises:
            UserError: it is not there, damaged, of another model, or of other adapters.
        """
        if self._adapters is not None:
            self._adapters.load(folder)
        elif (folder / ADAPTERS).exists():
            if self._place.train:
                raise UserError(
                    f"{folder} holds adapters, not whole weights: set policy.lora_rank, lora_text "
                    "and lora_image as its run had them"
                )
            self._adapters = Adapters.saved(self._network, folder)  # to sample with
            self._network.requires_grad_(False)
        if self._adapters is None or (folder / WEIGHTS).exists():
            stored = open_weights(folder, self._network)
            read_over(stored, self._network.published())
            self._stored = stored
