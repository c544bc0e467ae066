"""BAGEL as a policy: it writes and it draws over one history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from unigrpo_core.errors import UserError
from unigrpo_core.interfaces import History, ImageFlowPolicy, TextPolicy
from unigrpo_core.keys import Key, uniforms
from unigrpo_core.plugin import Placement
from unigrpo_core.records import Prompt, Sampling, TextSegment
from unigrpo_models.bagel.checkpoint import (
    open_weights,
    overwrite_weights,
    read_weights,
    write_checkpoint,
)
from unigrpo_models.bagel.config import BagelConfig
from unigrpo_models.bagel.decoding import decode_texts
from unigrpo_models.bagel.history import BagelHistory, empty_history
from unigrpo_models.bagel.latents import latent_shape, unpatchify
from unigrpo_models.bagel.network import BagelNetwork, Layer
from unigrpo_models.bagel.replay import ReplayRoot, image_velocity
from unigrpo_models.bagel.tokens import Codec, pad
from unigrpo_models.stored import Stored
from unigrpo_models.weights import WeightSets


class BagelPolicy(TextPolicy, ImageFlowPolicy):
    """See :mod:`unigrpo_models.bagel.network` for the architecture and the shapes.

    The text expert owns the understanding weights, the embeddings and the head; the image expert
    the ``_moe_gen`` weights, the time embedder and the latent projections.
    """

    def __init__(self, network: BagelNetwork, codec: Codec, folder: Path, place: Placement) -> None:
        self.network = network
        self.codec = codec
        self.folder = folder
        self.place = place
        self.stored: Stored | None = None  # what the weights were loaded from
        self._root = ReplayRoot(network, codec, place.compute)
        experts = self.parameters()
        for expert, owned in experts.items():
            for parameter in owned.values():
                parameter.requires_grad_(expert in place.train)
        self._sets = WeightSets(
            {name: p for expert in sorted(place.train) for name, p in experts[expert].items()}
        )
        self._allowed = codec.allowed(place.device)

    @property
    def root(self) -> nn.Module:
        return self._root

    def parameters(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        experts: dict[str, dict[str, nn.Parameter]] = {"text": {}, "image": {}}
        for name, parameter in self._root.named_parameters():
            if "_pos_embed" not in name:
                experts["image" if _is_image(name) else "text"][name] = parameter
        return experts

    def keep(self, name: str) -> None:
        self._sets.keep(name)

    def weights(self, name: str) -> AbstractContextManager[None]:
        return self._sets.use(name)

    def wrap_units(self) -> tuple[type[nn.Module], ...]:
        return (Layer,)

    def save(self, folder: Path) -> None:
        state: Mapping[str, Tensor] = self.network.state_dict()
        if self.stored is not None:  # it has what was not trained, in its own type
            state = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        write_checkpoint(folder, state, self.stored, self.folder)

    def load(self, folder: Path) -> None:
        stored = open_weights(folder, self.network)
        overwrite_weights(stored, self.network)
        self.stored = stored

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

    @torch.inference_mode()
    def open(self, prompts: Sequence[Prompt]) -> BagelHistory:
        return self._read([self.codec.context(prompt) for prompt in prompts])

    def _read(self, rows: Sequence[Sequence[int]]) -> BagelHistory:
        """The history of texts, in one causal pass."""
        with self._autocast():
            _, caches = self.network.text(
                pad(rows, self.codec.eos, self.place.device), want_hidden=False
            )
        return BagelHistory(tuple(caches), tuple(tuple(row) for row in rows))

    @torch.inference_mode()
    def branches(self, history: History, names: Sequence[str]) -> Mapping[str, BagelHistory]:
        return {name: self._unconditional(name, len(history)) for name in names}

    def _unconditional(self, name: str, rows: int) -> BagelHistory:
        if name != "text":
            raise UserError(f'bagel has no unconditional context {name!r}; it has "text"')
        if not self.codec.system:
            return empty_history(self.network.config.llm, rows, self.place.device)
        return self._read([self.codec.system] * rows)

    @torch.inference_mode()
    def append(self, history: History, written: TextSegment) -> BagelHistory:
        assert isinstance(history, BagelHistory)
        thoughts = self.codec.thoughts(written.tokens.tolist(), written.mask.tolist())
        for row, length in zip(history.ids, written.mask.sum(1).tolist(), strict=True):
            self._room(len(row), length)
        return self._read([[*a, *b] for a, b in zip(history.ids, thoughts, strict=True)])

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
                self.network, self.codec, grown, self._allowed, uniform, sampling.temperature
            )
        thoughts = self.codec.thoughts(segment.tokens.tolist(), segment.mask.tolist())
        ids = tuple((*a, *b) for a, b in zip(history.ids, thoughts, strict=True))
        # In float32 the keys and values of single steps are those of one pass, up to rounding. In
        # a coarser type that rounding is felt, so the image gets what the trainer will compute.
        exact = self.place.compute == torch.float32
        return segment, grown.filled(ids) if exact else self._read(ids)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        return latent_shape(self.network.config.latent, size)

    def image_tokens(self, size: tuple[int, int]) -> int:
        height, width, _ = latent_shape(self.network.config.latent, size)
        return height * width + 2

    def time_shift(self, size: tuple[int, int]) -> float:
        return self.network.config.latent.time_shift

    @torch.inference_mode()
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
            )

    @torch.inference_mode()
    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return (unpatchify(self.network.config.latent, latents) * 0.5 + 0.5).clamp(0, 1)

    def _autocast(self) -> torch.autocast:
        compute = self.place.compute
        return torch.autocast(self.place.device.type, compute, enabled=compute != torch.float32)


def _is_image(name: str) -> bool:
    return "_moe_gen" in name or any(
        part in name for part in ("time_embedder", "vae2llm", "llm2vae")
    )


def load_bagel(folder: Path, system_prompt: str, place: Placement) -> BagelPolicy:
    """The policy of a checkpoint folder.

    Raises:
        UserError: the folder is no checkpoint of this layout, or a tensor is missing, unexpected
            or misshapen. All of it is known before any weight is read.
    """
    config = BagelConfig.read(folder)
    if config.latent.space != "pixels":
        raise UserError(
            f"{folder}: images in the latents of the {config.latent.space} autoencoder are not "
            "supported yet, only pixels are"
        )
    llm = config.llm
    codec = Codec.read(folder, llm.vocab_size, llm.max_position_embeddings, system_prompt)
    with torch.device("meta"):
        network = BagelNetwork(config)
    stored = open_weights(folder, network)

    def dtype_of(name: str) -> torch.dtype:
        trained = ("image" if _is_image(name) else "text") in place.train
        return torch.float32 if trained or "_pos_embed" in name else place.compute

    network.load_state_dict(read_weights(stored, network, place.device, dtype_of), assign=True)
    policy = BagelPolicy(network, codec, folder, place)
    policy.stored = stored
    return policy
