"""BAGEL as a policy: it writes and it draws over one history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from unigrpo_core.errors import UserError
from unigrpo_core.interfaces import History, ImageFlowPolicy, ImageReader, TextPolicy
from unigrpo_core.keys import Key, uniforms
from unigrpo_core.plugin import Placement
from unigrpo_core.records import Prompt, Sampling, TextSegment
from unigrpo_models.adapters import Lora
from unigrpo_models.bagel.autoencoder import Autoencoder, read_autoencoder
from unigrpo_models.bagel.checkpoint import open_weights
from unigrpo_models.bagel.config import BagelConfig
from unigrpo_models.bagel.contexts import continued, read, unconditional
from unigrpo_models.bagel.decoding import decode_texts
from unigrpo_models.bagel.history import BagelHistory
from unigrpo_models.bagel.latents import latent_shape, unpatchify
from unigrpo_models.bagel.looking import LookAt, look_at
from unigrpo_models.bagel.network import BagelNetwork, Layer
from unigrpo_models.bagel.replay import ReplayRoot, image_velocity
from unigrpo_models.bagel.tokens import Codec
from unigrpo_models.bagel.trained import TrainedWeights, type_of
from unigrpo_models.compiled import compile_units
from unigrpo_models.reading import read as read_tensors
from unigrpo_models.reading import shapes_of
from unigrpo_models.stored import Stored

TextBranch = Literal["system", "empty"]


class BagelPolicy(TextPolicy, ImageFlowPolicy, ImageReader):
    """See :mod:`unigrpo_models.bagel.network` for the architecture and the shapes.

    The text expert owns the understanding weights, the embeddings and the head; the image expert
    the ``_moe_gen`` weights, the time embedder and the latent projections.
    """

    def __init__(
        self,
        network: BagelNetwork,
        codec: Codec,
        folder: Path,
        place: Placement,
        *,
        stored: Stored | None = None,
        lora: Lora | None = None,
        autoencoder: Autoencoder | None = None,
        look: LookAt = "vae_vit",
        name: str = "",
    ) -> None:
        self.network = network
        self.codec = codec
        self.folder = folder
        self.place = place
        self.autoencoder = autoencoder
        self.look_mode = look
        network.checkpointing = place.checkpointing
        if place.compile:
            compile_units(network.layers[:-1])  # the last has passes of its own
        self._weights = TrainedWeights(network, stored, folder, place, lora, name or str(folder))
        self._root = ReplayRoot(network, codec, place.compute)

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
        return (Layer,)

    def save(self, folder: Path) -> None:
        self._weights.save(folder)

    def load(self, folder: Path) -> None:
        self._weights.load(folder)

    # --- sampling -----------------------------------------------------------------------------

    def prompt_tokens(self, prompt: Prompt, thought: int = 0) -> int:
        tokens = len(self.codec.context(prompt))
        if thought:
            self._room(tokens, thought)
        return tokens

    def _room(self, tokens: int, thought: int) -> int:
        """The slots that a text of so many tokens and a thought take, between [bos] and [eos]."""
        room = tokens + thought + 2
        if room > self.codec.max_length:
            raise UserError(
                f"a prompt of {tokens} tokens and a thought of {thought} take a context of {room}; "
                f"the model's ends at {self.codec.max_length}: lower text.max_tokens"
            )
        return room

    @torch.no_grad()
    def open(self, prompts: Sequence[Prompt]) -> BagelHistory:
        told = [self.codec.context(prompt) for prompt in prompts]
        with self._autocast():
            return read(self.network, self.codec, told, told, [len(self.codec.system)] * len(told))

    @torch.no_grad()
    def start(self, rows: int) -> BagelHistory:
        told = [self.codec.system] * rows
        with self._autocast():
            return read(self.network, self.codec, told, told, [0] * rows)

    @torch.no_grad()
    def tell(self, history: History, prompts: Sequence[Prompt]) -> BagelHistory:
        assert isinstance(history, BagelHistory)
        said = [self.codec.wrap(prompt.text) for prompt in prompts]
        for prompt, length, row in zip(prompts, history.lengths, said, strict=True):
            if length + len(row) >= self.codec.max_length:
                raise UserError(
                    f"prompt {prompt.id!r} makes a context of {length + len(row)} tokens; the "
                    f"model's ends at {self.codec.max_length}: {prompt.text[:80]!r}"
                )
        told = tuple((*a, *b) for a, b in zip(history.told, said, strict=True))
        with self._autocast():
            longer = continued(self.network, self.codec, history, said)
        return replace(longer, told=told, free=history.positions)

    @torch.no_grad()
    def look(self, history: History, images: Tensor, keys: Sequence[Key]) -> BagelHistory:
        assert isinstance(history, BagelHistory)
        images = images.to(self.place.device, torch.float32)
        with self._autocast():
            return look_at(
                self.network, self.codec, self.autoencoder, history, images, keys, self.look_mode
            )

    @torch.no_grad()
    def branches(self, history: History, names: Sequence[str]) -> Mapping[str, BagelHistory]:
        assert isinstance(history, BagelHistory)
        with self._autocast():
            return {name: unconditional(self.network, self.codec, history, name) for name in names}

    @torch.no_grad()
    def append(self, history: History, written: TextSegment) -> BagelHistory:
        assert isinstance(history, BagelHistory)
        thoughts = self.codec.thoughts(written.tokens.tolist(), written.mask.tolist())
        for slots, length in zip(history.lengths, written.mask.sum(1).tolist(), strict=True):
            self._room(slots, length)
        with self._autocast():
            return continued(self.network, self.codec, history, thoughts)

    @torch.no_grad()
    def write(
        self, history: History, sampling: Sampling, keys: Sequence[Key]
    ) -> tuple[TextSegment, BagelHistory]:
        assert isinstance(history, BagelHistory)
        limit = sampling.max_tokens
        room = self._room(max(history.lengths), limit)
        uniform = uniforms([key.child("token") for key in keys], limit, self.place.device)
        grown = history.grown(room)
        with self._autocast():
            segment = decode_texts(
                self.network,
                self.codec,
                grown,
                self._root.allowed,
                uniform,
                sampling.temperature,
                graphs=self.place.cuda_graphs,
            )
        thoughts = self.codec.thoughts(segment.tokens.tolist(), segment.mask.tolist())
        ids = tuple((*a, *b) for a, b in zip(history.ids, thoughts, strict=True))
        # In float32 the keys and values of single steps are those of one pass, up to rounding. In
        # a coarser type that rounding is felt, so the image gets what the trainer will compute.
        if self.place.compute == torch.float32:
            return segment, grown.filled(ids)
        with self._autocast():
            return segment, continued(self.network, self.codec, history, thoughts)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        return latent_shape(self.network.config.latent, size)

    def image_tokens(self, size: tuple[int, int]) -> int:
        height, width, _ = latent_shape(self.network.config.latent, size)
        return height * width + 2

    def time_shift(self, size: tuple[int, int]) -> float:
        return self.network.config.latent.time_shift

    @torch.no_grad()
    def velocity(self, history: History, x_t: Tensor, t: Tensor) -> Tensor:
        assert isinstance(history, BagelHistory)
        with self._autocast():
            return image_velocity(
                self.network,
                self.codec,
                x_t,
                t,
                list(history.caches),
                list(history.lengths),
                owner=history.equals,
                positions=history.positions,
            )

    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        grid = unpatchify(self.network.config.latent, latents)
        image = grid if self.autoencoder is None else self.autoencoder.decode(grid)
        return (image * 0.5 + 0.5).clamp(0, 1)

    def _autocast(self) -> torch.autocast:
        compute = self.place.compute
        return torch.autocast(self.place.device.type, compute, enabled=compute != torch.float32)


def load_bagel(
    folder: Path,
    system_prompt: str,
    place: Placement,
    *,
    lora: Lora | None = None,
    text_branch: TextBranch = "system",
    look: LookAt = "vae_vit",
    pixels: torch.dtype = torch.float32,
    name: str = "",
) -> BagelPolicy:
    """The policy of a checkpoint folder, whole or with adapters; ``pixels`` is the type that its
    autoencoder computes in, ``name`` what adapters call it (its folder if empty).

    Raises:
        UserError: the folder is no checkpoint of this layout, or a tensor is missing, unexpected
            or misshapen. All of it is known before any weight is read.
    """
    config = BagelConfig.read(folder)
    llm, blank = config.llm, text_branch == "empty"
    codec = Codec.read(
        folder, llm.vocab_size, llm.max_position_embeddings, system_prompt, blank=blank
    )
    autoencoder = None
    if config.latent.space == "flux":
        autoencoder = read_autoencoder(folder, config.latent.channels, place.device, pixels)
    with torch.device("meta"):
        network = BagelNetwork(config)
    stored = open_weights(folder, network)
    wanted = shapes_of(network.published())
    state = read_tensors(stored, wanted, place.device, lambda name: type_of(name, place, lora))
    network.load_state_dict(state, assign=True)
    return BagelPolicy(
        network,
        codec,
        folder,
        place,
        stored=stored,
        lora=lora,
        autoencoder=autoencoder,
        look=look,
        name=name,
    )
