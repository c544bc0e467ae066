"""Decoding texts: a whole group at once, each different row read once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unigrpo_core.records import TextSegment
from unigrpo_models.causal.history import sampled
from unigrpo_models.causal.network import CausalNetwork
from unigrpo_models.causal.slots import spread
from unigrpo_models.causal.tokens import Codec, Ids, pad
from unigrpo_models.sampling import draw_tokens, scaled_logits

PATIENCE = 16
"""Turns between two looks at whether all rows have ended; a GPU has to wait for each."""


def decode_texts(
    network: CausalNetwork,
    codec: Codec,
    rows: Sequence[Ids],
    allowed: Tensor,
    uniform: Tensor,
    temperature: float,
) -> TextSegment:
    """Samples a text for each of B rows of ids, until all have drawn an end or the limit is
    reached. ``allowed`` is bool [V], ``uniform`` float64 [B, limit]: token j of a row takes draw j.
    """
    group = _Group(network, codec, rows, allowed, uniform, temperature)
    gpu, limit = uniform.device.type == "cuda", uniform.shape[1]
    for turn in range(limit):
        group.draw(turn)
        looks = turn % PATIENCE == PATIENCE - 1 or not gpu
        if turn == limit - 1 or (looks and not bool(group.active.any())):
            break
        group.feed(turn)
    return group.texts()


class _Group:
    """A group that is being decoded: tensors that every turn changes in place. Rows are padded on
    the left, so that all of them take one slot a turn, and lie in one piece."""

    def __init__(
        self,
        network: CausalNetwork,
        codec: Codec,
        rows: Sequence[Ids],
        allowed: Tensor,
        uniform: Tensor,
        temperature: float,
    ) -> None:
        self.network, self.codec, self.uniform = network, codec, uniform
        self.allowed, self.temperature = allowed, temperature
        (count, limit), device = uniform.shape, uniform.device
        different = list(dict.fromkeys(rows))
        place = {row: number for number, row in enumerate(different)}
        index = torch.tensor([place[row] for row in rows], device=device)
        ids = pad(different, device, left=True)
        self.width = ids.shape[1]
        lengths = torch.tensor([len(row) for row in different], device=device)
        ahead = self.width - lengths  # slots of padding
        slots = torch.arange(self.width + limit, device=device)
        shown = (slots >= ahead[:, None]).long()
        padded = len(set(map(len, different))) > 1
        self.cache = network.new_cache()
        hidden = network.hidden(
            ids,
            shown[:, : self.width] if padded else None,
            (slots[: self.width] - ahead[:, None]).clamp(min=0),
            self.cache,
        )
        self.final = hidden[:, -1][index]
        spread(self.cache, index, self.width + limit)
        self.shown = shown[index] if padded else None
        self.position = lengths[index]  # of the token that is fed next
        self.ends = torch.zeros(codec.width, dtype=torch.bool, device=device)
        self.ends[list(codec.ends)] = True
        self.tokens = torch.zeros(count, limit, dtype=torch.int64, device=device)
        self.mask = torch.zeros(count, limit, dtype=torch.bool, device=device)
        self.logps = torch.zeros(count, limit, device=device)
        self.active = torch.ones(count, dtype=torch.bool, device=device)  # rows without an end

    def draw(self, turn: int) -> None:
        """Draws the next token of every active row; the others get one that nothing reads."""
        logits = scaled_logits(self.network.logits(self.final), self.allowed, self.temperature)
        drawn = draw_tokens(logits, self.uniform[:, turn])
        chosen = logits.gather(1, drawn[:, None])[:, 0] - logits.logsumexp(1)
        self.tokens[:, turn] = drawn
        self.mask[:, turn] = self.active
        self.logps[:, turn] = torch.where(self.active, chosen, 0.0)
        self.active &= ~self.ends[drawn]

    def feed(self, turn: int) -> None:
        """Feeds every row what it has drawn."""
        shown = None if self.shown is None else self.shown[:, : self.width + turn + 1]
        ids = self.tokens[:, turn, None]
        self.final = self.network.hidden(ids, shown, self.position[:, None], self.cache)[:, -1]
        self.position += 1

    def texts(self) -> TextSegment:
        """What was drawn."""
        used = int(self.mask.sum(1).max())
        tokens, mask, logps = (x[:, :used] for x in (self.tokens, self.mask, self.logps))
        tokens = tokens.masked_fill(~mask, self.codec.ends[0])
        texts = tuple(self.codec.decode(ids) for ids in sampled(tokens, mask))
        return TextSegment(tokens, mask, logps.contiguous(), texts)
