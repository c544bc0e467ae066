"""Any policy that writes with any policy that draws: one thinks, the other paints what was said.

The image is conditioned on a text made of prompt and thought, so no gradient of the image reaches
the thinker: what joins the two is the reward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from unigrpo_core.interfaces import History, ImageFlowPolicy, TextPolicy
from unigrpo_core.keys import Key
from unigrpo_core.records import Prompt, Replay, ReplayBatch, Sampling, TextSegment
from unigrpo_models.template import conditioning_text

PARTS = ("text", "image")


def told(template: str, prompt: Prompt, thought: str) -> Prompt:
    """What the painter is told of an episode."""
    return replace(prompt, text=conditioning_text(template, prompt.text, thought).strip())


@dataclass(frozen=True, eq=False)
class ComposedHistory(History):
    """The thinker's history of B rows, with what the painter is to be told of each."""

    said: History
    prompts: tuple[Prompt, ...]
    thoughts: tuple[str, ...]
    painter: ImageFlowPolicy
    template: str

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Tensor) -> Self:
        places = index.tolist()
        return replace(
            self,
            said=self.said.rows(index),
            prompts=tuple(self.prompts[row] for row in places),
            thoughts=tuple(self.thoughts[row] for row in places),
        )

    @cached_property
    def shown(self) -> History:
        """The painter's history of the same rows."""
        pairs = zip(self.prompts, self.thoughts, strict=True)
        return self.painter.open([told(self.template, *pair) for pair in pairs])


class ComposedRoot(nn.Module):
    """The trainable root: those of the two parts, each asked for its own."""

    def __init__(self, text: TextPolicy, image: ImageFlowPolicy, template: str) -> None:
        super().__init__()
        self.text, self.image, self.template = text.root, image.root, template

    def forward(self, batch: ReplayBatch) -> Replay:
        silent = replace(batch, x_t=None, t=None, branches=())
        logps = (
            self.text(silent).logps
            if batch.want_logps
            else torch.zeros(batch.tokens.shape, device=batch.tokens.device)
        )
        if batch.x_t is None:
            return Replay(logps, None, {})
        thoughts = batch.thoughts or ("",) * len(batch.prompts)
        pairs = zip(batch.prompts, thoughts, strict=True)
        shown = replace(
            batch,
            prompts=tuple(told(self.template, *pair) for pair in pairs),
            tokens=batch.tokens[:, :0],
            mask=batch.mask[:, :0],
            want_logps=False,
            thoughts=(),
        )
        drawn: Replay = self.image(shown)
        return replace(drawn, logps=logps)


class ComposedPolicy(TextPolicy, ImageFlowPolicy):
    """The text expert is the first part's, the image expert the second's; ``template`` makes what
    the painter is told (see :mod:`unigrpo_models.template`)."""

    def __init__(self, text: TextPolicy, image: ImageFlowPolicy, template: str) -> None:
        self.text, self.image, self.template = text, image, template
        self._root = ComposedRoot(text, image, template)

    @property
    def root(self) -> nn.Module:
        return self._root

    def parameters(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        return {
            name: {f"{name}.{path}": p for path, p in part.parameters().get(name, {}).items()}
            for name, part in self._parts
        }

    @property
    def _parts(self) -> tuple[tuple[str, TextPolicy | ImageFlowPolicy], ...]:
        return (("text", self.text), ("image", self.image))

    def keep(self, name: str, decay: float | None = None) -> None:
        for _, part in self._parts:
            part.keep(name, decay)

    def weights(self, name: str) -> AbstractContextManager[None]:
        return self._kept(name)

    @contextmanager
    def _kept(self, name: str) -> Iterator[None]:
        with ExitStack() as stack:
            for _, part in self._parts:
                stack.enter_context(part.weights(name))
            yield

    def wrap_units(self) -> tuple[type[nn.Module], ...]:
        return tuple(dict.fromkeys(self.text.wrap_units() + self.image.wrap_units()))

    def save(self, folder: Path) -> None:
        for name, part in self._parts:
            part.save(folder / name)

    def load(self, folder: Path) -> None:
        for name, part in self._parts:
            part.load(folder / name)

    # --- sampling -----------------------------------------------------------------------------

    def prompt_tokens(self, prompt: Prompt, thought: int = 0) -> int:
        self.image.prompt_tokens(told(self.template, prompt, ""))
        return self.text.prompt_tokens(prompt, thought)

    def open(self, prompts: Sequence[Prompt]) -> ComposedHistory:
        thoughts = ("",) * len(prompts)
        said = self.text.open(prompts)
        return ComposedHistory(said, tuple(prompts), thoughts, self.image, self.template)

    def branches(self, history: History, names: Sequence[str]) -> Mapping[str, History]:
        assert isinstance(history, ComposedHistory)
        return self.image.branches(history.shown, names) if names else {}

    def write(
        self, history: History, sampling: Sampling, keys: Sequence[Key]
    ) -> tuple[TextSegment, ComposedHistory]:
        assert isinstance(history, ComposedHistory)
        written, said = self.text.write(history.said, sampling, keys)
        return written, replace(history, said=said, thoughts=written.texts)

    def append(self, history: History, written: TextSegment) -> ComposedHistory:
        assert isinstance(history, ComposedHistory)
        said = self.text.append(history.said, written)
        return replace(history, said=said, thoughts=written.texts)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        return self.image.latent_shape(size)

    def image_tokens(self, size: tuple[int, int]) -> int:
        return self.image.image_tokens(size)

    def time_shift(self, size: tuple[int, int]) -> float:
        return self.image.time_shift(size)

    def velocity(self, history: History, x_t: Tensor, t: Tensor) -> Tensor:
        """Over a history, or over one of its branches, which are the painter's own."""
        shown = history.shown if isinstance(history, ComposedHistory) else history
        return self.image.velocity(shown, x_t, t)

    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return self.image.decode(latents, size)

    def cut_tokens(self, prompt: Prompt, thought: str = "") -> Mapping[str, int]:
        return self.image.cut_tokens(told(self.template, prompt, thought))
