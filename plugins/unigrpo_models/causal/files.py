"""What a folder of a causal language model has, and where to find it; light, for ``check``."""

from __future__ import annotations

import json
from pathlib import Path

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import Files

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
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


def check_tokenizer(folder: Path) -> None:
    """Whether there is a tokenizer.

    Raises:
        UserError: there is none.
    """
    if not any((folder / name).is_file() for name in TOKENIZER):
        raise UserError(
            f"{folder} has no tokenizer: none of {', '.join(TOKENIZER)}; save it beside the model "
            "by tokenizer.save_pretrained"
        )


def check_chat(folder: Path) -> None:
    """Whether there is a chat template, in a file of its own or in that of the tokenizer.

    Raises:
        UserError: there is none.
    """
    if any((folder / name).exists() for name in TEMPLATES):
        return
    file = folder / "tokenizer_config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        found = None
    if not found:
        raise UserError(
            f"the tokenizer in {folder} has no chat template, as of a base model; set policy.chat "
            "= false, or give a model that was trained to chat"
        )
