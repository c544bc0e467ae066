"""The one gradient path: the trainer's pass over a replay batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unigrpo_core.records import Replay, ReplayBatch
from unigrpo_models.causal.history import sampled
from unigrpo_models.causal.network import CausalNetwork
from unigrpo_models.causal.tokens import Codec, pad
from unigrpo_models.sampling import scaled_logits

LOGITS = 1 << 26
"""Logits at a time: 256 MB of float32. Beyond that they are computed in parts, and again in the
backward, so that those of a large vocabulary are never all there."""


class ReplayRoot(nn.Module):
    """The trainable root. Rows are padded on the right, where nothing that counts sees it, so that
    attention is causal and no more."""

    def __init__(self, network: CausalNetwork, codec: Codec, compute: torch.dtype) -> None:
        super().__init__()
        self.model = network.model
        self.network = network
        self.codec = codec
        self.compute = compute
        self.allowed: Tensor
        self.register_buffer("allowed", codec.allowed(network.device), persistent=False)

    def forward(self, batch: ReplayBatch) -> Replay:
        assert batch.x_t is None, "a language model draws no images"
        logps = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
        if batch.want_logps and bool(batch.mask.any()):
            device = batch.tokens.device
            with torch.autocast(device.type, self.compute, enabled=self.compute != torch.float32):
                found = self._logps(batch)
            logps = logps.masked_scatter(batch.mask, found)
        return Replay(logps, None, {})

    def _logps(self, batch: ReplayBatch) -> Tensor:
        """float32 [N], those of the N sampled tokens, row by row."""
        contexts = [self.codec.context(prompt) for prompt in batch.prompts]
        texts = sampled(batch.tokens, batch.mask)
        rows = [(*context, *text[:-1]) for context, text in zip(contexts, texts, strict=True)]
        hidden = self.network.hidden(pad(rows, batch.tokens.device, left=False))
        # Token j of a text is predicted at the place before it.
        starts = torch.tensor([len(context) - 1 for context in contexts], device=hidden.device)
        place = starts[:, None] + batch.mask.cumsum(1) - 1
        row = torch.arange(len(rows), device=hidden.device)[:, None].expand_as(place)
        predicting = hidden[row[batch.mask], place[batch.mask]]
        tokens = batch.tokens[batch.mask]
        many = max(1, LOGITS // self.codec.width)
        if len(tokens) <= many:
            return self._chosen(predicting, tokens, batch.temperature)
        parts = zip(torch.split(predicting, many), torch.split(tokens, many), strict=True)
        return torch.cat(
            [
                checkpoint(
                    self._chosen,
                    states,
                    chosen,
                    batch.temperature,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                for states, chosen in parts
            ]
        )

    def _chosen(self, hidden: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        """The log-probs [N] of tokens [N] that hidden states [N, D] predict."""
        logits = scaled_logits(self.network.logits(hidden), self.allowed, temperature)
        return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)
