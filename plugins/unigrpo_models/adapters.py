"""Low-rank adapters (LoRA, arXiv 2106.09685) on linear layers by name, through PEFT and in its
files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unigrpo_core.errors import UserError
from unigrpo_core.keys import Key, uniforms
from unigrpo_core.loading import said
from unigrpo_models.targets import bind

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Lora:
    """What is adapted: y = W x + alpha / rank * B A x, with A [rank, in] and B [out, rank]."""

    rank: int
    alpha: int
    targets: Mapping[str, tuple[str, ...]]  # names of layers, per expert


class Adapters:
    """The adapters of a network, which computes with them from now on, at first in vain: A is drawn
    alike in every run, from U(-1/sqrt(in), 1/sqrt(in)), B is 0; both are float32.

    Args:
        layers: the paths of the linear layers that get one.

    Raises:
        UserError: PEFT is missing.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], rank: int, alpha: int) -> None:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise UserError(
                'adapters need PEFT: pip install "unigrpo[lora]", or set policy.lora_rank to 0'
            ) from error
        self.layers = tuple(layers)
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(layers))
        with torch.random.fork_rng():  # PEFT draws what is drawn anew below
            self._model: Any = get_peft_model(network, config)
        for name in layers:
            layer: Any = network.get_submodule(name)
            layer.cast_input_dtype_enabled = False  # autocast does it, without a float32 copy
            _draw(name, layer.lora_A["default"].weight)

    @classmethod
    def of(cls, network: nn.Module, lora: Lora, expert_of: Callable[[str], str | None]) -> Adapters:
        """Those that ``lora`` asks for; ``expert_of`` names the expert that owns a layer, by the
        layer's path, or None.

        Raises:
            UserError: PEFT is missing, or a target binds no linear layer of its expert.
        """
        linear = [name for name, x in network.named_modules() if isinstance(x, nn.Linear)]
        bound: list[str] = []
        for expert, targets in lora.targets.items():
            bound += bind(expert, targets, [n for n in linear if expert_of(n) == expert])
        return cls(network, bound, lora.rank, lora.alpha)

    @classmethod
    def saved(cls, network: nn.Module, folder: Path) -> Adapters:
        """Those that :meth:`save` wrote.

        Raises:
            UserError: they are damaged, or of another network.
        """
        path = folder / CONFIG
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            layers = sorted(config["target_modules"])
            found = cls(network, layers, int(config["r"]), int(config["lora_alpha"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} does not fit this model: {said(error)}") from error
        found.load(folder)
        return found

    @property
    def fresh(self) -> bool:
        """Whether they change nothing: every B is 0."""
        return not any(
            bool(p.any()) for name, p in self._model.named_parameters() if ".lora_B." in name
        )

    @contextmanager
    def off(self) -> Iterator[None]:
        """Computes without them, and without gradient."""
        with torch.no_grad(), self._model.disable_adapter():
            yield

    def save(self, folder: Path, base: str) -> None:
        """Writes them in PEFT's layout; ``base`` names the model they are of."""
        config = self._model.peft_config["default"]
        config.base_model_name_or_path, config.auto_mapping = base, None
        config.target_modules = set(self.layers)  # in whole: PEFT's short forms bind more elsewhere
        config.save_pretrained(str(folder), auto_mapping_dict=None)
        state = {name: x.detach().cpu() for name, x in self._state().items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    def _state(self) -> dict[str, Tensor]:
        """By PEFT's names. Whether embeddings belong to it PEFT would ask the hub: they do not."""
        from peft import get_peft_model_state_dict

        state: dict[str, Tensor] = get_peft_model_state_dict(
            self._model, save_embedding_layers=False
        )
        return state

    def load(self, folder: Path) -> None:
        """Takes over what :meth:`save` wrote.

        Raises:
            UserError: it is not there, damaged, or of other layers or another rank.
        """
        from peft import set_peft_model_state_dict

        path = folder / WEIGHTS
        try:
            state = load_file(path)
        except FileNotFoundError as error:
            raise UserError(
                f"{folder} has no {WEIGHTS}: its run trained without adapters; set "
                "policy.lora_rank to 0, or adapt its weights by naming it as policy.checkpoint"
            ) from error
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        mine = self._state()
        found = {name: tuple(x.shape) for name, x in state.items()}
        wanted = {name: tuple(x.shape) for name, x in mine.items()}
        if found != wanted:
            other = sorted(found.items() ^ wanted.items())[0][0]
            raise UserError(
                f"{path} has adapters of other layers or another rank than this recipe's: {other} "
                f"is {found.get(other, 'missing')} there and {wanted.get(other, 'missing')} here; "
                "policy.lora_rank, lora_text and lora_image must be those of that run"
            )
        set_peft_model_state_dict(self._model, state)


@torch.no_grad()
def _draw(name: str, weight: nn.Parameter) -> None:
    """U(-1/sqrt(in), 1/sqrt(in)), PEFT's own start, by a key of the layer's name."""
    bound = 1 / math.sqrt(weight.shape[1])
    drawn = uniforms([Key(("lora", name))], weight.numel(), weight.device)
    weight.copy_(((2 * drawn - 1) * bound).view(weight.shape))
