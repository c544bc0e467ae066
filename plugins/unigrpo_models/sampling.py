"""Drawing tokens by keyed uniforms: the inverse CDF in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 256


def scaled_logits(logits: Tensor, allowed: Tensor, temperature: float) -> Tensor:
    """float32 logits [..., V] of the distribution sampled from: tokens outside ``allowed``
    (bool [V]) are impossible. Sampler and trainer share this."""
    return (logits.float() / temperature).masked_fill(~allowed, float("-inf"))


def draw_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """int64 [B]: the token at which the CDF of softmax(logits [B, V]) passes uniform [B] (float64).

    The CDF is defined in two levels, on every device: sums over chunks of 256 tokens, then inside
    the chunk. A token of probability 0 is never drawn.
    """
    weights = torch.exp(logits.double() - logits.max(1, keepdim=True).values.double())
    rows, width = weights.shape
    chunks = F.pad(weights, (0, -width % CHUNK)).view(rows, -1, CHUNK)
    totals = chunks.sum(2)
    chunk, rest = _locate(totals, uniform * totals.sum(1))
    inside, _ = _locate(chunks[torch.arange(rows, device=chunk.device), chunk], rest)
    return chunk * CHUNK + inside


def _locate(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first index whose cumulative weight exceeds the target, and what the target has left
    there; at most the last index of positive weight, whatever the rounding."""
    cumulative = weights.cumsum(1)
    positive = weights > 0
    last = weights.shape[1] - 1 - positive.flip(1).int().argmax(1)
    index = torch.minimum((cumulative <= target[:, None]).sum(1), last)
    before = (cumulative - weights).gather(1, index[:, None])[:, 0]
    return index, target - before
