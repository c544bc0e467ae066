"""The one gradient path: the trainer's pass over a replay batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unigrpo_core.records import Replay, ReplayBatch
from unigrpo_models.bagel.history import empty_history
from unigrpo_models.bagel.network import BagelNetwork, Before, LayerCache
from unigrpo_models.bagel.tokens import Codec, empty_slots, pad, padding_mask
from unigrpo_models.sampling import scaled_logits


@dataclass(frozen=True, eq=False)
class _Texts:
    """What was read: contexts and thoughts, or the thoughts after shared contexts."""

    states: Tensor  # [B, L, D], final hidden states
    starts: list[int]  # where in them each thought starts
    caches: list[LayerCache]  # of contexts and thoughts
    lengths: list[int]  # of both
    hidden: Tensor  # bool [B, slots], the slots that hold nothing


class ReplayRoot(nn.Module):
    """The trainable root. Text runs causally in one stream; every image point is a row of its own
    over its text's keys and values: the shapes of the sampler's calls."""

    def __init__(self, network: BagelNetwork, codec: Codec, compute: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.codec = codec
        self.compute = compute

    @property
    def device(self) -> torch.device:
        return self.network.vae2llm.weight.device

    def forward(self, batch: ReplayBatch) -> Replay:
        device = batch.tokens.device
        with torch.autocast(device.type, self.compute, enabled=self.compute != torch.float32):
            contexts = [self.codec.context(prompt) for prompt in batch.prompts]
            thoughts = self.codec.thoughts(batch.tokens.tolist(), batch.mask.tolist())
            texts = self._read(contexts, thoughts, batch.want_logps)
            logps = self._logps(batch, texts)
            if batch.x_t is None or batch.t is None:
                return Replay(logps, None, {})
            velocities = self._velocities(batch, texts.caches, texts.lengths, texts.hidden)
            branches = {name: self._branch(batch, name) for name in batch.branches}
        return Replay(logps, velocities, branches)

    def _read(
        self, contexts: list[list[int]], thoughts: list[list[int]], want_states: bool
    ) -> _Texts:
        """Contexts with their thoughts. In float32 a context that several thoughts share is
        computed once; in a coarser type every text is one causal pass, as in sampling."""
        network, eos, device = self.network, self.codec.eos, self.device
        lengths = [len(a) + len(b) for a, b in zip(contexts, thoughts, strict=True)]
        if self.compute != torch.float32 or not any(thoughts):
            rows = [[*a, *b] for a, b in zip(contexts, thoughts, strict=True)]
            ids = pad(rows, eos, device)
            states, caches = network.text(ids, want_hidden=want_states)
            starts = [len(context) for context in contexts]
            return _Texts(states, starts, caches, lengths, empty_slots(lengths, ids.shape[1]))
        unique = list(dict.fromkeys(map(tuple, contexts)))
        number = {context: row for row, context in enumerate(unique)}
        index = torch.tensor([number[tuple(context)] for context in contexts], device=device)
        ids = pad(unique, eos, device)
        _, shared = network.text(ids, want_hidden=False)
        sizes = [len(context) for context in contexts]
        hidden = empty_slots(sizes, ids.shape[1])
        before = Before(
            [(k[index], v[index]) for k, v in shared],
            torch.tensor(sizes, device=device),
            hidden.to(device),
        )
        ids = pad(thoughts, eos, device)
        states, caches = network.text(ids, before, want_hidden=want_states)
        own = empty_slots([len(thought) for thought in thoughts], ids.shape[1])
        return _Texts(states, [0] * len(contexts), caches, lengths, torch.cat((hidden, own), 1))

    def _logps(self, batch: ReplayBatch, texts: _Texts) -> Tensor:
        if not batch.want_logps:
            return torch.zeros(batch.tokens.shape, device=batch.tokens.device)
        # Token j of a thought is predicted at the place before it; [bos] stands at its start.
        hidden = texts.states
        place = torch.tensor(texts.starts)[:, None] + torch.arange(batch.tokens.shape[1])
        place = place.clamp(max=hidden.shape[1] - 1).to(hidden.device)
        hidden = hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[2]))
        logits = scaled_logits(
            self.network.language_model.lm_head(hidden),
            self.codec.allowed(hidden.device),
            batch.temperature,
        )
        tokens = batch.tokens.masked_fill(~batch.mask, self.codec.eos)
        chosen = logits.gather(2, tokens[..., None])[..., 0]
        logps = chosen - logits.logsumexp(2)
        return torch.where(batch.mask, logps, 0.0)

    def _velocities(
        self,
        batch: ReplayBatch,
        caches: list[LayerCache],
        lengths: list[int],
        hidden: Tensor | None = None,
    ) -> Tensor:
        assert batch.x_t is not None
        assert batch.t is not None
        if not batch.context_gradient:
            caches = [(k.detach(), v.detach()) for k, v in caches]
        v = image_velocity(
            self.network,
            self.codec,
            batch.x_t.flatten(0, 1),
            batch.t.flatten(),
            caches,
            lengths,
            hidden,
            frozen=not batch.context_gradient,
        )
        return v.view(batch.x_t.shape)

    def _branch(self, batch: ReplayBatch, name: str) -> Tensor:
        """Velocities over the unconditional context: the system prompt alone."""
        assert name == "text", name
        rows, device, system = len(batch.prompts), batch.tokens.device, self.codec.system
        if system:
            _, caches = self.network.text(
                torch.tensor([system] * rows, device=device), want_hidden=False
            )
        else:
            caches = list(empty_history(self.network.config.llm, rows, device).caches)
        return self._velocities(batch, caches, [len(system)] * rows)


def image_velocity(
    network: BagelNetwork,
    codec: Codec,
    x_t: Tensor,
    t: Tensor,
    caches: list[LayerCache],
    lengths: list[int],
    hidden: Tensor | None = None,
    *,
    frozen: bool = False,
) -> Tensor:
    """Velocities [R, h, w, token] over the caches of C texts of the given lengths, which serve
    R / C images each: what the sampler and the trainer both call. ``hidden`` bool [C, L]: the slots
    that hold nothing; by default those from each length on."""
    device, (height, width) = x_t.device, x_t.shape[1:3]
    if hidden is None:
        hidden = empty_slots(lengths, caches[0][0].shape[2])
    padding = padding_mask(hidden, height * width + 2, device)
    if padding is not None:
        padding = padding.repeat_interleave(len(x_t) // len(lengths), 0)
    v = network.velocity(
        x_t.flatten(1, 2),
        t,
        network.table_rows(height, width),
        torch.tensor([[codec.image_start, codec.image_end]], device=device),
        torch.tensor(lengths, device=device),
        caches,
        padding,
        frozen=frozen,
    )
    return v.view(x_t.shape)
