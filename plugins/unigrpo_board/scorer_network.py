"""The scorer's network: a picture and a prompt as two points on one sphere.

The image tower is three convolutions of stride 2, each with a ReLU, from 24 x 24 pixels to 3 x 3
cells, and one linear map; the text tower adds up the embeddings of a prompt's words, blind to their
order, and maps the sum through one hidden layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from unigrpo_core.errors import UserError

CONFIG = "config.json"
WEIGHTS = "scorer.safetensors"
REMAKE = "`python -m unigrpo_board.make_scorer FOLDER` makes one"


class ScorerConfig(BaseModel):
    """What ``config.json`` says: the words in the order of their embeddings, and the sizes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    words: tuple[str, ...] = Field(min_length=1)
    channels: tuple[int, int, int] = Field(description="of the three convolutions")
    hidden: int = Field(gt=0, description="width of the text tower")
    width: int = Field(gt=0, description="of both embeddings")


class ScorerNetwork(nn.Module):
    """Both towers. ``encode_image`` and ``encode_text`` have the names and shapes that tools for
    CLIP-like models expect; what they return is not normalised."""

    def __init__(self, config: ScorerConfig) -> None:
        super().__init__()
        self.config = config
        first, second, third = config.channels
        self.image = nn.Sequential(
            nn.Conv2d(3, first, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(second, third, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(9 * third, config.width),
        )
        self.text = nn.Sequential(
            nn.Linear(len(config.words), config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.width),
        )

    def count(self, texts: Sequence[str]) -> Tensor:
        """How often each word occurs: float32 [B, words].

        Raises:
            UserError: a text has a word that the scorer does not know.
        """
        numbers = {word: number for number, word in enumerate(self.config.words)}
        counts = torch.zeros(len(texts), len(numbers))
        for row, text in enumerate(texts):
            for word in text.split():
                if word not in numbers:
                    raise UserError(
                        f"board_scorer does not know {word!r}, in the prompt {text[:80]!r}; it "
                        f'judges the prompts of the source "board", whose words are: '
                        f"{' '.join(numbers)}"
                    )
                counts[row, numbers[word]] += 1
        return counts

    def encode_image(self, images: Tensor) -> Tensor:
        """[B, width] of images [B, 3, 24, 24] in [0, 1]."""
        return cast(Tensor, self.image(images * 2 - 1))

    def encode_text(self, counts: Tensor) -> Tensor:
        """[B, width] of word counts [B, words]."""
        return cast(Tensor, self.text(counts))

    def cosine(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """The cosine of each image with its text: float32 [B] in [-1, 1]."""
        seen, said = self.encode_image(images), self.encode_text(self.count(texts))
        return F.cosine_similarity(seen, said)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(self.config.model_dump_json(indent=2) + "\n")
        save_file(self.state_dict(), folder / WEIGHTS)


def load(folder: Path) -> ScorerNetwork:
    """The scorer in a folder, frozen.

    Raises:
        UserError: a file is missing or damaged, or the weights are not those of the config.
    """
    try:
        config = ScorerConfig.model_validate_json((folder / CONFIG).read_bytes())
        state = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        lost = CONFIG if not (folder / CONFIG).exists() else WEIGHTS
        raise UserError(f"{folder} is no scorer: it has no {lost}; {REMAKE}") from error
    except ValidationError as error:
        first = error.errors()[0]
        said = f"{'.'.join(map(str, first['loc'])) or CONFIG}: {first['msg']}"
        raise UserError(f"{folder / CONFIG} is damaged: {said}; {REMAKE}") from error
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} is damaged: {error}; {REMAKE}") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error}") from error
    with torch.device("meta"):  # no weights are drawn that would be replaced at once
        network = ScorerNetwork(config)
    try:
        network.load_state_dict({name: x.float() for name, x in state.items()}, assign=True)
    except RuntimeError as error:
        raise UserError(
            f"{folder / WEIGHTS} does not fit {CONFIG} beside it: {error}; {REMAKE}"
        ) from error
    if not all(torch.isfinite(x).all() for x in state.values()):
        raise UserError(f"{folder / WEIGHTS} has numbers that are not finite; {REMAKE}")
    return network.requires_grad_(False).eval()
