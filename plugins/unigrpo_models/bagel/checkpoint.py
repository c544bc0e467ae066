"""A checkpoint folder in the published layout: reading its weights and writing one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unigrpo_core.errors import UserError
from unigrpo_models.adapters import WEIGHTS as ADAPTERS
from unigrpo_models.bagel.config import BagelConfig
from unigrpo_models.bagel.network import BagelNetwork

WEIGHTS = "ema.safetensors"
COMPANIONS = (
    *("llm_config.json", "vit_config.json", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
)


def write_checkpoint(network: BagelNetwork, source: Path, folder: Path) -> None:
    """Writes the weights, and beside them what loading needs of the folder ``source``."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: x.detach().cpu().contiguous() for name, x in network.published().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    if folder.resolve() == source.resolve():
        return
    for name in COMPANIONS:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def read_weights(folder: Path, network: BagelNetwork, device: torch.device) -> dict[str, Tensor]:
    """The float32 weights in a folder, every one that the network has and no other.

    Raises:
        UserError: the file is missing or damaged, or a tensor is missing, unexpected or misshapen.
    """
    path = folder / WEIGHTS
    try:
        state = load_file(path, device=str(device))
    except FileNotFoundError as error:
        adapters = (folder / ADAPTERS).exists()
        raise UserError(
            f"{folder} holds adapters, not whole weights: set policy.lora_rank, lora_text and "
            "lora_image as its run had them"
            if adapters
            else f"{folder} has no {WEIGHTS}"
        ) from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    _check(path, network, state)
    return {name: x.float() for name, x in state.items()}


def _check(path: Path, network: BagelNetwork, state: Mapping[str, Tensor]) -> None:
    wanted = {name: tuple(x.shape) for name, x in network.published().items()}
    found = {name: tuple(x.shape) for name, x in state.items()}
    problems = [f"missing {name} {wanted[name]}" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{name} is {found[name]}, expected {wanted[name]}"
        for name in sorted(wanted.keys() & found.keys())
        if wanted[name] != found[name]
    ]
    if problems:
        listed = "\n  ".join(problems[:8])
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(f"{path} does not fit its llm_config.json:\n  {listed}{more}")


def write_config(folder: Path, config: BagelConfig) -> None:
    """Writes ``llm_config.json`` and ``config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "llm_config.json").write_text(config.llm.model_dump_json(indent=2) + "\n")
    extra = {"latent": config.latent.model_dump()}
    (folder / "config.json").write_text(json.dumps(extra, indent=2) + "\n")
