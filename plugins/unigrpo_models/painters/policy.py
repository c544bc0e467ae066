"""A painter as a policy that only draws: ``episode = ["draw"]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from unigrpo_core.errors import UserError
from unigrpo_core.interfaces import History, ImageFlowPolicy
from unigrpo_core.plugin import Placement
from unigrpo_core.records import Prompt, Replay, ReplayBatch
from unigrpo_models.adapters import Lora
from unigrpo_models.painters.painter import Condition, Painter, rows_of
from unigrpo_models.painters.trained import PainterWeights
from unigrpo_models.template import conditioning_text


@dataclass(frozen=True, eq=False)
class Told(History):
    """B texts that images are drawn of, read: row b has the condition at ``places[b]``."""

    condition: Condition  # a row per different text
    places: Tensor  # int64 [B], on the CPU

    @classmethod
    def of(cls, painter: Painter, texts: Sequence[str]) -> Self:
        """The texts, read.

        Raises:
            UserError: a text is longer than an encoder reads.
        """
        different = list(dict.fromkeys(texts))
        number = {text: place for place, text in enumerate(different)}
        return cls(painter.encode(different), torch.tensor([number[text] for text in texts]))

    def __len__(self) -> int:
        return len(self.places)

    def rows(self, index: Tensor) -> Self:
        return replace(self, places=self.places[index.cpu()])

    def velocity(self, painter: Painter, network: nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
        """float32 [B, *] for x_t [B, *] and t [B]."""
        return painter.velocity(network, x_t, t, rows_of(self.condition, self.places))

    def velocities(self, painter: Painter, network: nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
        """float32 [B, K, *] at K points of every row, x_t [B, K, *] and t [B, K]."""
        points = replace(self, places=self.places.repeat_interleave(t.shape[1]))
        v = points.velocity(painter, network, x_t.flatten(0, 1), t.flatten())
        return v.view(x_t.shape)


class PainterRoot(nn.Module):
    """The trainable root: every point is a row of its own, as in sampling. Texts are read by frozen
    encoders, so there is no context gradient to stop."""

    def __init__(self, painter: Painter, template: str, negative: str) -> None:
        super().__init__()
        self.painter, self.template, self.negative = painter, template, negative
        self.network = painter.network

    def told(self, prompts: Sequence[Prompt]) -> Told:
        texts = [conditioning_text(self.template, prompt.text) for prompt in prompts]
        return Told.of(self.painter, texts)

    def untold(self, rows: int) -> Told:
        """What guidance's branch "text" stands on."""
        return Told.of(self.painter, [self.negative] * rows)

    def forward(self, batch: ReplayBatch) -> Replay:
        logps = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
        if batch.x_t is None or batch.t is None:
            return Replay(logps, None, {})
        told = {"": self.told(batch.prompts)}
        told |= {name: self.untold(len(batch.prompts)) for name in batch.branches}
        found = {
            name: text.velocities(self.painter, self.network, batch.x_t, batch.t)
            for name, text in told.items()
        }
        return Replay(logps, found.pop(""), found)


class PainterPolicy(ImageFlowPolicy):
    """Draws prompts, each told to the painter by a template.

    Args:
        template: see :mod:`unigrpo_models.template`; there is no thought.
        negative: the text of guidance's branch "text", as it stands.

    Raises:
        UserError: a target of ``lora`` binds nothing, or the negative text is too long.
    """

    def __init__(
        self,
        painter: Painter,
        place: Placement,
        *,
        template: str = "{prompt}",
        negative: str = "",
        lora: Lora | None = None,
    ) -> None:
        self.painter = painter
        painter.text_tokens(negative)
        if lost := {n: count for n, count in painter.cut_tokens(negative).items() if count}:
            name, count = max(lost.items(), key=lambda item: item[1])
            raise UserError(
                f"policy.negative is longer than {name} reads, whose encoder would leave out its "
                f"last {count} tokens; shorten it"
            )
        self._weights = PainterWeights(painter, place, lora)
        self._root = PainterRoot(painter, template, negative)

    @property
    def root(self) -> nn.Module:
        return self._root

    def parameters(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        return self._weights.parameters(self._root)

    def keep(self, name: str, decay: float | None = None) -> None:
        self._weights.keep(name, decay)

    def weights(self, name: str) -> AbstractContextManager[None]:
        return self._weights.use(name)

    def wrap_units(self) -> tuple[type[nn.Module], ...]:
        return tuple(dict.fromkeys(type(block) for block in self.painter.units()))

    def save(self, folder: Path) -> None:
        self._weights.save(folder)

    def load(self, folder: Path) -> None:
        self._weights.load(folder)

    # --- sampling -----------------------------------------------------------------------------

    def prompt_tokens(self, prompt: Prompt, thought: int = 0) -> int:
        return self.painter.text_tokens(conditioning_text(self._root.template, prompt.text))

    def open(self, prompts: Sequence[Prompt]) -> Told:
        return self._root.told(prompts)

    def branches(self, history: History, names: Sequence[str]) -> Mapping[str, Told]:
        return {name: self._root.untold(len(history)) for name in names}

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        return self.painter.latent_shape(size)

    def image_tokens(self, size: tuple[int, int]) -> int:
        return self.painter.image_tokens(size)

    def time_shift(self, size: tuple[int, int]) -> float:
        return self.painter.time_shift(size)

    @torch.no_grad()
    def velocity(self, history: History, x_t: Tensor, t: Tensor) -> Tensor:
        assert isinstance(history, Told)
        return history.velocity(self.painter, self.painter.network, x_t, t)

    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return self.painter.decode(latents, size)

    def cut_tokens(self, prompt: Prompt, thought: str = "") -> Mapping[str, int]:
        return self.painter.cut_tokens(conditioning_text(self._root.template, prompt.text))
