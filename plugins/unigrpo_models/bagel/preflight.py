"""What can be told of a checkpoint folder without loading it, and so without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from unigrpo_models.bagel.config import BagelConfig
from unigrpo_models.bagel.layout import AUTOENCODER, SPECIAL, TOKENIZER, WEIGHTS, expert_of
from unigrpo_models.stored import Stored
from unigrpo_models.targets import bind


def preflight(folder: Path, targets: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What keeps a run from starting, as far as headers and configurations show; ``targets`` are
    the layers of each expert that get adapters.

    Raises:
        UserError: the configuration, the header of a file or a target does not fit.
    """
    files = {WEIGHTS: "weights are"}
    if BagelConfig.read(folder).latent.space == "flux":
        files[AUTOENCODER] = "autoencoder is"
    names: list[str] = []
    for name, what in files.items():
        file = folder / name
        if not file.exists():
            yield f"the {what} not there yet: {file}"
            continue
        stored = Stored(file)
        stored.close()
        if name == WEIGHTS:
            flat = (n for n, entry in stored.entries.items() if len(entry.shape) == 2)
            names = [n.removesuffix(".weight") for n in flat if "embed" not in n]
    for expert, words in targets.items():
        if names:
            bind(expert, words, [name for name in names if expert_of(name) == expert])
    yield from _tokenizer(folder)


def _tokenizer(folder: Path) -> Iterator[str]:
    """Whether the control tokens' words stand in one of the tokenizer's files."""
    there = [folder / name for name in TOKENIZER if (folder / name).exists()]
    if not there:
        yield f"{folder} has no tokenizer: none of {', '.join(TOKENIZER[:3])} is there"
        return
    told = "".join(file.read_text(encoding="utf-8", errors="replace") for file in there)
    if missing := [word for word in SPECIAL.values() if word not in told]:
        yield f"the tokenizer in {folder} lacks {', '.join(missing)}"
