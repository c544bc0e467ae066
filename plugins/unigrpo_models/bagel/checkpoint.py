"""A checkpoint folder in the published layout: reading its weights and writing one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from unigrpo_core.errors import UserError
from unigrpo_models.bagel.config import BagelConfig
from unigrpo_models.bagel.layout import COMPANIONS, EYES, WEIGHTS
from unigrpo_models.bagel.network import BagelNetwork
from unigrpo_models.reading import TYPES, check_fit, shapes_of
from unigrpo_models.stored import Stored, write_header

NAMES = {dtype: name for name, dtype in TYPES.items()}


def open_weights(folder: Path, network: BagelNetwork) -> Stored:
    """The weights of a folder, opened, with every tensor that the network has and no other. What
    reads images may be there without the network having it. No data is read.

    Raises:
        UserError: the file is missing or damaged, or a tensor is missing, unexpected, misshapen or
            of whole numbers.
    """
    if not (folder / WEIGHTS).exists() and (folder / f"{WEIGHTS}.index.json").exists():
        raise UserError(f"{folder} holds its weights in several files; {WEIGHTS} in one is needed")
    stored = Stored(folder / WEIGHTS)
    wanted = shapes_of(network.published())
    check_fit(stored, wanted, "does not fit its llm_config.json", spare=EYES)
    return stored


def write_checkpoint(
    folder: Path, state: Mapping[str, Tensor], stored: Stored | None, source: Path
) -> None:
    """Writes a checkpoint folder: the tensors of ``state`` in their own types, which for trained
    ones is float32 (a step of a small learning rate is lost in a coarser one); every other tensor
    of ``stored`` byte for byte; and beside them what else the folder ``source`` has of the layout.
    All files are written under other names first: if the disk is full, what was there stays.

    Raises:
        OSError: the folder cannot be written.
    """
    made: list[tuple[Path, Path]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in () if folder.resolve() == source.resolve() else COMPANIONS:
            if (source / name).exists():
                made.append((_beside(folder / name), folder / name))
                shutil.copyfile(source / name, made[-1][0])
        made.append((_beside(folder / WEIGHTS), folder / WEIGHTS))
        with made[-1][0].open("wb") as out:
            _write_weights(out, state, stored)
            out.flush()
            os.fsync(out.fileno())
        for partial, final in made:
            partial.replace(final)
    finally:
        for partial, _ in made:
            partial.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".partial-{path.name}")


def _write_weights(out: BinaryIO, state: Mapping[str, Tensor], stored: Stored | None) -> None:
    kept = {} if stored is None else stored.entries
    described = {name: (entry.dtype, entry.shape) for name, entry in kept.items()}
    described |= {name: (NAMES[x.dtype], tuple(x.shape)) for name, x in state.items()}
    for name in write_header(out, described):
        if name in state:
            x = state[name].detach().cpu().contiguous()
            out.write(x.view(-1).view(torch.uint8).numpy().data)
        elif stored is not None:
            out.writelines(stored.chunks(name))


def write_config(folder: Path, config: BagelConfig) -> None:
    """Writes ``llm_config.json`` and ``config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "llm_config.json").write_text(config.llm.model_dump_json(indent=2) + "\n")
    extra = {"latent": config.latent.model_dump()}
    (folder / "config.json").write_text(json.dumps(extra, indent=2) + "\n")
