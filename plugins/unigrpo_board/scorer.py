"""The reward ``board_scorer``: how well a small learned model finds picture and prompt to match.

It is imperfect by intention, so that it can be hacked: a proxy, with the verifier as the truth.
How it was made and what it gets right is in docs/scorer.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from unigrpo_board.rewards import images_of
from unigrpo_core.errors import UserError
from unigrpo_core.interfaces import Reward
from unigrpo_core.plugin import (
    Field,
    Files,
    HubPath,
    Options,
    Provider,
    fetched_folder,
    local_folder,
)
from unigrpo_core.records import RewardBatch

if TYPE_CHECKING:
    from torch import Tensor

    from unigrpo_board.scorer_network import ScorerNetwork


FILES = Files(published=("config.json", "scorer.safetensors"))
"""Of a folder that lacks one, :func:`~unigrpo_board.scorer_network.load` tells what to do."""


class ScorerOptions(Options):
    """Which scorer."""

    checkpoint: HubPath = Field(
        "pkg:unigrpo_board/scorer",
        description="a folder that `python -m unigrpo_board.make_scorer` wrote, "
        "pkg:PACKAGE/FOLDER for one that a package ships, or an id of the Hugging Face hub",
    )


class BoardScorer(Reward):
    """(1 + cosine) / 2 of the image's and the prompt's embeddings, in [0, 1]; see
    :mod:`unigrpo_board.scorer_network`. It computes on the CPU, in float32; gradients reach the
    images."""

    reads: ClassVar = frozenset({"prompt", "image"})
    range: ClassVar = (0.0, 1.0)

    def __init__(self, network: ScorerNetwork) -> None:
        self.network = network

    def score(self, batch: RewardBatch) -> Tensor:
        images = images_of(batch, "board_scorer")
        texts = [prompt.text for prompt in batch.prompts]
        score = (1 + self.network.cosine(images.float().cpu(), texts)) / 2
        return score.to(images.device)

    def details(self, batch: RewardBatch) -> Mapping[str, Tensor]:
        return {}


def build(options: ScorerOptions) -> BoardScorer:
    from unigrpo_board.scorer_network import load

    return BoardScorer(load(fetched_folder("checkpoint", options.checkpoint, FILES)))


def notes(options: ScorerOptions) -> Sequence[str]:
    try:
        local_folder("checkpoint", options.checkpoint, FILES)
    except UserError as error:
        return (str(error),)
    return ()


PROVIDER = Provider(
    name="board_scorer",
    build=build,
    options=ScorerOptions,
    differentiable=True,
    summary="a small learned judge of picture against prompt, imperfect so that it can be hacked",
    notes=notes,
)
