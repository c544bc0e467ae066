"""Decoding thoughts: a whole group at once, over preallocated slots."""

from __future__ import annotations

import torch
from torch import Tensor

from unigrpo_core.records import TextSegment
from unigrpo_models.bagel.history import BagelHistory
from unigrpo_models.bagel.network import BagelNetwork
from unigrpo_models.bagel.tokens import Codec
from unigrpo_models.sampling import draw_tokens, scaled_logits


def decode_texts(
    network: BagelNetwork,
    codec: Codec,
    history: BagelHistory,
    allowed: Tensor,
    uniform: Tensor,
    temperature: float,
) -> TextSegment:
    """Samples a text for every row of ``history``, whose free slots it fills in place.

    Feeds [bos], then what was drawn, until every row has had its end token fed; a row that was cut
    off at the limit gets an end that is not scored. ``allowed`` is bool [V], ``uniform`` float64
    [B, limit]: token j of a row takes draw j.
    """
    rows, limit = uniform.shape
    device = uniform.device
    each = torch.arange(rows, device=device)
    place = torch.tensor(history.lengths, device=device)  # the next slot of every row
    ahead = place - torch.tensor(history.positions, device=device)  # images: slots, one position
    width = max(history.lengths)
    capacity = history.caches[0][0].shape[2]
    hidden_slots = torch.arange(capacity, device=device) >= place[:, None]
    padding = torch.zeros(rows, 1, 1, capacity, device=device)
    padding.masked_fill_(hidden_slots[:, None, None], float("-inf"))
    tokens = torch.full((rows, limit), codec.eos, device=device)
    mask = torch.zeros(rows, limit, dtype=torch.bool, device=device)
    logps = torch.zeros(rows, limit, device=device)
    feed = torch.full((rows,), codec.bos, device=device)
    active = torch.ones(rows, dtype=torch.bool, device=device)  # rows that are fed
    ending = torch.zeros_like(active)  # rows that are fed their end
    for turn in range(limit + 2):
        width += 1
        padding[each, 0, 0, place] = torch.where(active, 0.0, float("-inf"))
        final = network.step(feed, place - ahead, list(history.caches), padding[..., :width], place)
        place = place + active
        active = active & ~ending
        if not bool(active.any()):
            break
        if turn == limit:
            feed, ending = torch.full_like(feed, codec.eos), active
            continue
        logits = scaled_logits(network.language_model.lm_head(final), allowed, temperature)
        feed = torch.where(active, draw_tokens(logits, uniform[:, turn]), codec.eos)
        ending = active & (feed == codec.eos)
        tokens[:, turn], mask[:, turn] = feed, active
        chosen = logits.gather(1, feed[:, None])[:, 0] - logits.logsumexp(1)
        logps[:, turn] = torch.where(active, chosen, 0.0)
    used = int(mask.sum(1).max())
    tokens, mask, logps = tokens[:, :used], mask[:, :used], logps[:, :used]
    texts = tuple(
        codec.decode([i for i, sampled in zip(row, kept, strict=True) if sampled])
        for row, kept in zip(tokens.tolist(), mask.tolist(), strict=True)
    )
    return TextSegment(tokens, mask, logps, texts)
