"""What differs from one image flow model to the next, and nothing else.

A painter knows texts, latents and times. It knows nothing of histories, prompts or episodes, so any
policy can draw with it; :mod:`unigrpo_models.painters.policy` is the one that only draws.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from unigrpo_core.plugin import Placement
from unigrpo_models.painters.parts import Tokenizer, moved

Condition = Mapping[str, Tensor]
"""What a network reads of texts: tensors whose first axis is the text's."""
Home = Literal["device", "host"]

HOST = torch.device("cpu")


class Painter(ABC):
    """An image flow model: a trained network, and around it frozen text encoders and a decoder.

    Args:
        folder: the pipeline it is of.
        network: diffusers' transformer, float32 where it is trained whole.
        encoders: modules that only :meth:`read` uses.
        home: where they wait: on the device, or in the host's memory until a new text comes.
        kept: how many texts' conditions are kept, in the host's memory; the last used stay.
    """

    targets: ClassVar[tuple[str, ...]]
    """The layers that customarily get adapters, by the end of their path."""
    blocks: ClassVar[tuple[str, ...]]
    """The network's lists of repeated blocks: units of compiling, recomputing and sharding."""

    def __init__(
        self,
        folder: Path,
        place: Placement,
        network: nn.Module,
        encoders: Sequence[nn.Module],
        home: Home = "device",
        kept: int = 2048,
    ) -> None:
        self.folder, self.place, self.network = folder, place, network
        self._encoders, self._home, self._limit = tuple(encoders), home, kept
        self._kept: OrderedDict[str, Condition] = OrderedDict()
        if home == "host":
            moved(self._encoders, HOST)

    # --- what differs -------------------------------------------------------------------------

    @abstractmethod
    def readers(self, text: str) -> Sequence[tuple[Tokenizer, str]]:
        """The tokenizers of the encoders, each with what it reads for this text."""

    @abstractmethod
    def read(self, text: str) -> Condition:
        """The condition of one text, [1, ...] each, by the encoders on the device."""

    @abstractmethod
    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """As in :class:`unigrpo_core.interfaces.ImageFlowPolicy`."""

    @abstractmethod
    def image_tokens(self, size: tuple[int, int]) -> int:
        """How many tokens the network processes for one image at one time, those of the text
        counted."""

    @abstractmethod
    def time_shift(self, size: tuple[int, int]) -> float:
        """The scheduler's own timestep shift at that size (1: none)."""

    @abstractmethod
    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """v = noise - data [B, *], by one call of the network, in the network's own units of time
        and sign of velocity."""

    @abstractmethod
    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """float32 [B, 3, H, W] in [0, 1] of final latents [B, *]; their gradient passes."""

    # --- what does not ------------------------------------------------------------------------

    def text_tokens(self, text: str) -> int:
        """How many tokens the text takes, in the encoder where it takes the most.

        Raises:
            UserError: more than an encoder reads, and the text is not to be cut.
        """
        return max(words.count(told) for words, told in self.readers(text))

    def cut_tokens(self, text: str) -> Mapping[str, int]:
        """How many tokens at its end are not read, by the name of the tokenizer; empty: a text that
        is too long is refused."""
        lost = {words.name: words.cut(told) for words, told in self.readers(text)}
        return {name: count for name, count in lost.items() if count is not None}

    def encode(self, texts: Sequence[str]) -> Condition:
        """The condition of texts, a row each, on the device and without gradient. A text is read
        alone and once, so what it gives depends on no other, nor on whether it was forgotten.

        Raises:
            UserError: as :meth:`text_tokens`.
        """
        found = {text: self._kept[text] for text in dict.fromkeys(texts) if text in self._kept}
        new = [text for text in dict.fromkeys(texts) if text not in found]
        if new:
            with self._at_work():
                for text in new:
                    found[text] = {name: x.to(HOST) for name, x in self.read(text).items()}
        for text, condition in found.items():
            self._kept[text] = condition
            self._kept.move_to_end(text)
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)
        rows = [found[text] for text in texts]
        names = rows[0].keys()
        return {
            name: torch.cat([row[name] for row in rows]).to(self.place.device) for name in names
        }

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """v = noise - data, float32 [B, *], for x_t [B, *], t [B] and a condition of B rows: what
        the sampler and the trainer both call. ``network`` is the painter's, wrapped or not."""
        with self._autocast():
            return self.predict(network, x_t, t, condition).float()

    def units(self) -> list[nn.Module]:
        """The network's repeated blocks."""
        return [block for name in self.blocks for block in getattr(self.network, name)]

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """The encoders on the device, without gradient."""
        if self._home == "host":
            moved(self._encoders, self.place.device)
        try:
            with torch.no_grad():
                yield
        finally:
            if self._home == "host":
                moved(self._encoders, HOST)

    def _autocast(self) -> torch.autocast:
        compute = self.place.compute
        return torch.autocast(self.place.device.type, compute, enabled=compute != torch.float32)


def rows_of(condition: Condition, places: Tensor) -> Condition:
    """The rows of a condition at ``places`` (int64 [B])."""
    return {name: x[places.to(x.device)] for name, x in condition.items()}
