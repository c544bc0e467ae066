"""The reward ``board_verifier``: what the pixels show against what the prompt asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from unigrpo_core.errors import UserError
from unigrpo_core.interfaces import Reward
from unigrpo_core.plugin import Options, Provider
from unigrpo_core.records import RewardBatch

if TYPE_CHECKING:
    from torch import Tensor

    from unigrpo_board.scene import Scene
    from unigrpo_board.verifier import Reading


class BoardVerifier(Reward):
    """Reads the board off the image; see :mod:`unigrpo_board.verifier` for the formulas.

    Its details are the drawing quality (mean over the nine cells) and, where the episode thinks,
    the thought's score (0 for an empty one) and the faithfulness of the image to the thought, each
    in [0, 1].
    """

    reads: ClassVar = frozenset({"metadata", "image"})
    range: ClassVar = (0.0, 1.0)

    def score(self, batch: RewardBatch) -> Tensor:
        import torch

        from unigrpo_board.verifier import verify

        pairs = zip(*_read(batch), strict=True)
        return torch.tensor([verify(scene, reading) for scene, reading in pairs])

    def details(self, batch: RewardBatch) -> Mapping[str, Tensor]:
        import torch

        from unigrpo_board.verifier import faithfulness, thought_score

        scenes, readings = _read(batch)
        found = {"quality": [reading.quality for reading in readings]}
        if batch.thoughts is not None:
            rows = list(zip(scenes, batch.thoughts, readings, strict=True))
            found["thought"] = [thought_score(scene, thought) for scene, thought, _ in rows]
            found["faithfulness"] = [faithfulness(thought, seen) for _, thought, seen in rows]
        return {name: torch.tensor(values) for name, values in found.items()}


def _read(batch: RewardBatch) -> tuple[list[Scene], list[Reading]]:
    from unigrpo_board.scene import Scene
    from unigrpo_board.verifier import read

    images = images_of(batch, "board_verifier")
    try:
        scenes = [Scene.from_metadata(prompt.metadata) for prompt in batch.prompts]
    except KeyError as error:
        raise UserError(
            f"board_verifier needs the prompt's {error} in its metadata, as the source "
            '"board" gives it'
        ) from None
    return scenes, read(images)


def images_of(batch: RewardBatch, who: str) -> Tensor:
    """The images of the batch [B, 3, 24, 24], as the embedded world has them.

    Raises:
        UserError: there are none, or of another size; ``who`` reads them.
    """
    from unigrpo_board.verifier import SIDE

    if batch.images is None:
        raise UserError(f"{who} reads images, but the episode draws none")
    height, width = batch.images.shape[2:]
    if (height, width) != (SIDE, SIDE):
        raise UserError(
            f"{who} reads images of {SIDE} x {SIDE} pixels, but image.size is [{height}, {width}]"
        )
    return batch.images


def build(options: Options) -> BoardVerifier:
    return BoardVerifier()


PROVIDER = Provider(
    name="board_verifier",
    build=build,
    summary="the embedded world's judge: objects, relation and drawing quality, read from pixels",
)
