"""A causal language model's weights in training: how they are saved and loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import Placement
from unigrpo_models.adapters import Lora
from unigrpo_models.causal.files import CONFIG, weight_files
from unigrpo_models.causal.loading import quiet, read_model
from unigrpo_models.causal.network import CausalNetwork
from unigrpo_models.trainable import Trainable

SMALL = 1 << 26  # bytes; what is larger is no tokenizer


def expert_of(name: str) -> str | None:
    """All of a language model is the text expert's."""
    return "text"


class TrainedWeights(Trainable):
    """The weights of a model, and the folder that they are of; ``base`` is what adapters call it.

    Raises:
        UserError: a target of ``lora`` binds nothing.
    """

    def __init__(
        self,
        network: CausalNetwork,
        folder: Path,
        place: Placement,
        lora: Lora | None,
        base: str,
    ) -> None:
        super().__init__(network.model, expert_of, place, lora)
        self._model: Any = network.model
        self._folder, self._base = folder, base
        # Kept, so that what was loaded can be saved although the folder has gone since.
        self._beside = {
            file.name: file.read_bytes()
            for pattern in ("*.json", "*.txt", "*.model", "*.jinja")
            for file in sorted(folder.glob(pattern))
            if file.name != CONFIG
            and not file.name.endswith(".index.json")
            and not file.name.startswith("adapter_")
            and file.stat().st_size < SMALL
        }

    def save(self, folder: Path) -> None:
        """Adapters in PEFT's layout; a whole model as its library saves it, with the tokenizer as
        it was. One that was not trained keeps its files of weights byte for byte.

        Raises:
            OSError: the folder cannot be written.
        """
        if self.adapters is not None:
            self.adapters.save(folder, self._base)
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self.trains or not self._folder.is_dir():
            with quiet():
                self._model.save_pretrained(str(folder))
        else:
            index = sorted(self._folder.glob("*.safetensors.index.json"))
            for file in (self._folder / CONFIG, *index, *weight_files(self._folder)):
                shutil.copyfile(file, folder / file.name)
        for name, content in self._beside.items():
            (folder / name).write_bytes(content)

    def load(self, folder: Path) -> None:
        """Takes over what :meth:`save` wrote.

        Raises:
            UserError: it is not there, damaged, of another model, or of other adapters.
        """
        if self.load_adapters(folder, "lora_text"):
            return
        mine = self._model.state_dict()
        dtype = next(iter(mine.values())).dtype
        found = read_model(folder, dtype, torch.device("cpu")).state_dict()
        shapes = ({n: tuple(x.shape) for n, x in state.items()} for state in (found, mine))
        other = sorted(set.symmetric_difference(*({*each.items()} for each in shapes)))
        if other:
            name = other[0][0]
            raise UserError(
                f"{folder} holds another model than {self._folder}: {name} is "
                f"{tuple(found[name].shape) if name in found else 'missing'} there and "
                f"{tuple(mine[name].shape) if name in mine else 'missing'} here"
            )
        with torch.no_grad():
            for name, x in mine.items():
                x.copy_(found[name])
