"""A causal language model of transformers as a policy: it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from unigrpo_core.errors import UserError
from unigrpo_core.interfaces import History, TextPolicy
from unigrpo_core.keys import Key, uniforms
from unigrpo_core.plugin import Placement
from unigrpo_core.records import Prompt, Sampling, TextSegment
from unigrpo_models.adapters import Lora
from unigrpo_models.causal.decoding import decode_texts
from unigrpo_models.causal.history import CausalHistory, sampled
from unigrpo_models.causal.loading import ends_of, forget_sampling, read_model
from unigrpo_models.causal.network import CausalNetwork
from unigrpo_models.causal.replay import ReplayRoot
from unigrpo_models.causal.tokens import Codec, Style
from unigrpo_models.causal.trained import TrainedWeights
from unigrpo_models.trainable import trained_whole


class CausalPolicy(TextPolicy):
    """The text expert owns the whole model; embeddings that are the head's too count once."""

    def __init__(
        self,
        network: CausalNetwork,
        codec: Codec,
        folder: Path,
        place: Placement,
        lora: Lora | None = None,
        name: str = "",
    ) -> None:
        self.network, self.codec, self.place = network, codec, place
        self._weights = TrainedWeights(network, folder, place, lora, name or str(folder))
        network.recompute(place.checkpointing)
        self._root = ReplayRoot(network, codec, place.compute)

    @property
    def root(self) -> nn.Module:
        return self._root

    def parameters(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        return {"text": self._weights.parameters(self._root)["text"]}

    def keep(self, name: str, decay: float | None = None) -> None:
        self._weights.keep(name, decay)

    def weights(self, name: str) -> AbstractContextManager[None]:
        return self._weights.use(name)

    def wrap_units(self) -> tuple[type[nn.Module], ...]:
        return tuple(dict.fromkeys(type(unit) for unit in self.network.units))

    def save(self, folder: Path) -> None:
        self._weights.save(folder)

    def load(self, folder: Path) -> None:
        self._weights.load(folder)

    # --- sampling -----------------------------------------------------------------------------

    def prompt_tokens(self, prompt: Prompt, thought: int = 0) -> int:
        tokens = len(self.codec.context(prompt))
        self.codec.check_room(tokens, thought)
        return tokens

    def open(self, prompts: Sequence[Prompt]) -> CausalHistory:
        return CausalHistory(tuple(self.codec.context(prompt) for prompt in prompts))

    def branches(self, history: History, names: Sequence[str]) -> Mapping[str, History]:
        if names:
            raise UserError(f"hf_causal_lm draws nothing, so it has no branch {names[0]!r}")
        return {}

    def append(self, history: History, written: TextSegment) -> CausalHistory:
        assert isinstance(history, CausalHistory)
        texts = sampled(written.tokens, written.mask)
        for before, text in zip(history.ids, texts, strict=True):
            self.codec.check_room(len(before), len(text))
        return history.appended(texts)

    @torch.no_grad()
    def write(
        self, history: History, sampling: Sampling, keys: Sequence[Key]
    ) -> tuple[TextSegment, CausalHistory]:
        assert isinstance(history, CausalHistory)
        limit, device, compute = sampling.max_tokens, self.place.device, self.place.compute
        self.codec.check_room(max(map(len, history.ids)), limit)
        uniform = uniforms([key.child("token") for key in keys], limit, device)
        with torch.autocast(device.type, compute, enabled=compute != torch.float32):
            written = decode_texts(
                self.network,
                self.codec,
                history.ids,
                self._root.allowed,
                uniform,
                sampling.temperature,
            )
        return written, history.appended(sampled(written.tokens, written.mask))


def load_causal(
    folder: Path, style: Style, place: Placement, *, lora: Lora | None = None, name: str = ""
) -> CausalPolicy:
    """The policy of a model's folder, whole or with adapters; ``name`` is what adapters call the
    model (its folder if empty).

    Raises:
        UserError: the folder has no causal language model, not all of its weights, or no tokenizer
            that fits; or the placement asks for what is not done with these models.
    """
    pair = "; in a pair eager = true beside its checkpoint leaves it out of this"
    for asked, key, more in (
        (place.compile, "compile", pair),
        (place.cuda_graphs, "cuda_graphs", ""),
    ):
        if asked:
            raise UserError(
                f"compute.{key} is true, which hf_causal_lm does not do: its passes are "
                f"transformers' own, whose cache is no part of a graph; set compute.{key} = "
                f"false{more}"
            )
    whole = trained_whole("text", place, lora)
    dtype = torch.float32 if whole else place.compute
    model = read_model(folder, dtype, place.device)
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    codec = Codec(folder, style, config.vocab_size, longest, ends_of(model))
    forget_sampling(model)
    network = CausalNetwork(model)
    network.check_head()
    return CausalPolicy(network, codec, folder, place, lora, name)
