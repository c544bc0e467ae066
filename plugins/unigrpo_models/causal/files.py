"""What a folder of a causal language model has, and where to find it; light, for ``check``."""

from __future__ import annotations

import json
from pathlib import Path

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import Files

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FILES = Files(
    needed=(CONFIG,),
    either=((SINGLE,), (INDEX,)),
    optional=("*.json", "model*.safetensors", "*.txt", "*.model", "*.jinja"),
)
"""What is read of a repository: no pickles, and no code."""


def weight_files(folder: Path) -> list[Path]:
    """The files of the weights, in the safetensors format.

    Raises:
        UserError: they are not there, or not all of them.
    """
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return [folder / SINGLE]
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        other = f" ({pickled[0]} is a pickle, which is not read)" if pickled else ""
        raise UserError(
            f"{folder} has no weights: neither {SINGLE} nor {INDEX}{other}; give a folder that "
            "save_pretrained wrote, or a hub id"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged: {error}; download or copy it again") from error
    gone = [name for name in names if not (folder / name).is_file()]
    if gone:
        raise UserError(
            f"{folder} lacks {len(gone)} of its {len(names)} files of weights, the first "
            f"{gone[0]}; download or copy them again"
        )
    return [folder / name for name in names]
