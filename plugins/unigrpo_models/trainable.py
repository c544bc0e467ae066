"""Which weights of a network are trained, and the copies of them that are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from torch import nn

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import Placement
from unigrpo_models.adapters import CONFIG, Adapters, Lora
from unigrpo_models.weights import WeightSets

ExpertOf = Callable[[str], str | None]
"""The expert that owns a parameter or a module, by its path; None for what no one trains."""


class Trainable:
    """The weights of a network of which each trained expert trains all it owns, or its adapters.

    Args:
        lora: the adapters; an expert that it does not name is trained whole.

    Raises:
        UserError: a target of ``lora`` binds nothing.
    """

    def __init__(
        self, network: nn.Module, expert_of: ExpertOf, place: Placement, lora: Lora | None
    ) -> None:
        self.network, self.expert_of = network, expert_of
        self.trains = bool(place.train)
        targets = {} if lora is None else lora.targets
        adapted = {expert: names for expert, names in targets.items() if expert in place.train}
        self.whole = place.train - adapted.keys()
        """The experts that are trained whole, if they own anything here."""
        self.adapters: Adapters | None = None
        if lora is not None and adapted:
            self.adapters = Adapters.of(network, replace(lora, targets=adapted), expert_of)
        for name, parameter in network.named_parameters():
            expert = expert_of(name)
            adapter = expert in adapted and ".lora_" in name
            parameter.requires_grad_(expert in self.whole or adapter)
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._sets = WeightSets(trained, host=place.reference == "host")
        self._only_adapters = bool(trained) and all(".lora_" in name for name in trained)
        self._bare: set[str] = set()  # what was kept while the adapters changed nothing

    def parameters(self, root: nn.Module) -> Mapping[str, Mapping[str, nn.Parameter]]:
        """Those of each expert, by their name in the root that holds the network."""
        experts: dict[str, dict[str, nn.Parameter]] = {"text": {}, "image": {}}
        for name, parameter in root.named_parameters():
            expert = self.expert_of(name)
            if expert is not None:
                experts[expert][name] = parameter
        return experts

    def load_adapters(self, folder: Path, options: str) -> bool:
        """Takes over the adapters that a folder has, and says whether it did: those that are
        trained, or, to sample with, those that are found. ``options`` are what a recipe names their
        layers by.

        Raises:
            UserError: they are not there, damaged, or not those that are trained here.
        """
        if self.adapters is not None:
            self.adapters.load(folder)
            return True
        if not (folder / CONFIG).exists():
            return False
        if self.trains:
            raise UserError(
                f"{folder} holds adapters, not whole weights: set policy.lora_rank and {options} "
                "as its run had them"
            )
        self.adapters = Adapters.saved(self.network, folder)
        self.network.requires_grad_(False)
        return True

    def keep(self, name: str, decay: float | None = None) -> None:
        """Remembers what is trained, as it is now; with a decay, as a moving average of it."""
        bare = self._only_adapters and self.adapters is not None and self.adapters.fresh
        if bare and decay is None:
            self._bare.add(name)
        else:
            self._bare.discard(name)
            self._sets.keep(name, decay)

    def use(self, name: str) -> AbstractContextManager[None]:
        """Computes with the weights kept under ``name``, without gradient."""
        if self.adapters is not None and name in self._bare:
            return self.adapters.off()
        return self._sets.use(name)


def trained_whole(expert: str | None, place: Placement, lora: Lora | None) -> bool:
    """Whether the weights of an expert are trained themselves, and so held in float32."""
    return expert in place.train and (lora is None or expert not in lora.targets)
