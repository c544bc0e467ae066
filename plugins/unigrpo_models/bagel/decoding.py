"""Decoding thoughts: a whole group at once, over preallocated slots."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unigrpo_core.records import TextSegment
from unigrpo_models.bagel.history import BagelHistory
from unigrpo_models.bagel.network import BagelNetwork
from unigrpo_models.bagel.tokens import Codec
from unigrpo_models.sampling import draw_tokens, scaled_logits

BUCKET = 128
"""A GPU sees slots by so many at a time: few shapes, so few kernels and few graphs."""
PATIENCE = 16
"""Turns between two looks at whether all rows have ended; a GPU has to wait for each."""


def decode_texts(
    network: BagelNetwork,
    codec: Codec,
    history: BagelHistory,
    allowed: Tensor,
    uniform: Tensor,
    temperature: float,
    *,
    graphs: bool = False,
) -> TextSegment:
    """Samples a text for every row of ``history``, whose free slots it fills in place.

    Feeds [bos], then what was drawn, until every row has had its end token fed; a row that was cut
    off at the limit gets an end that is not scored. ``allowed`` is bool [V], ``uniform`` float64
    [B, limit]: token j of a row takes draw j. With ``graphs`` a GPU replays its turns as CUDA
    graphs, one for each number of slots that are seen.
    """
    state = _Group(network, codec, history, allowed, uniform, temperature)
    gpu, limit = uniform.device.type == "cuda", uniform.shape[1]
    recorded = _Graphs(state) if gpu and graphs else None
    for turn in range(limit + 2):
        seen = max(history.lengths) + turn + 1
        seen = min(state.capacity, seen + -seen % BUCKET if gpu else seen)
        if recorded is not None:
            recorded.turn(seen)
        else:
            state.feed(seen)
        if (turn % PATIENCE == PATIENCE - 1 or not gpu) and not bool(state.active.any()):
            break
        if recorded is None:
            state.draw()
    return state.texts()


class _Group:
    """A group that is being decoded: tensors that every turn changes in place, so that a turn can
    be recorded."""

    def __init__(
        self,
        network: BagelNetwork,
        codec: Codec,
        history: BagelHistory,
        allowed: Tensor,
        uniform: Tensor,
        temperature: float,
    ) -> None:
        self.network, self.codec, self.caches = network, codec, list(history.caches)
        self.allowed, self.temperature = allowed, temperature
        (rows, limit), device = uniform.shape, uniform.device
        self.capacity = self.caches[0][0].shape[2]
        self.each = torch.arange(rows, device=device)
        self.place = torch.tensor(history.lengths, device=device)  # the next slot of every row
        positions = torch.tensor(history.positions, device=device)
        self.ahead = self.place - positions  # images take many slots and one position
        hidden = torch.arange(self.capacity, device=device) >= self.place[:, None]
        self.padding = torch.zeros(rows, 1, 1, self.capacity, device=device)
        self.padding.masked_fill_(hidden[:, None, None], float("-inf"))
        self.number = torch.zeros(1, dtype=torch.int64, device=device)  # of the token to draw
        self.limit = limit
        self.uniform = F.pad(uniform, (0, 2))
        self.tokens = torch.full((rows, limit + 2), codec.eos, device=device)
        self.mask = torch.zeros(rows, limit + 2, dtype=torch.bool, device=device)
        self.logps = torch.zeros(rows, limit + 2, device=device)
        self.next = torch.full((rows,), codec.bos, device=device)  # what is fed next
        self.active = torch.ones(rows, dtype=torch.bool, device=device)  # rows that are fed
        self.ending = torch.zeros_like(self.active)  # rows that are fed their end
        self.final = torch.zeros(0, device=device)

    def feed(self, seen: int) -> None:
        """Feeds every active row its next token, which sees the first ``seen`` slots."""
        shown = torch.where(self.active, 0.0, float("-inf"))
        self.padding[self.each, 0, 0, self.place] = shown
        padding, position = self.padding[..., :seen], self.place - self.ahead
        self.final = self.network.step(self.next, position, self.caches, padding, self.place)
        self.place += self.active
        self.active &= ~self.ending

    def draw(self) -> None:
        """Draws the token that every active row is fed next: its end, after the last draw."""
        head = self.network.language_model.lm_head
        logits = scaled_logits(head(self.final), self.allowed, self.temperature)
        drawn = draw_tokens(logits, self.uniform.index_select(1, self.number)[:, 0])
        scored = self.active & (self.number < self.limit)
        self.next.copy_(torch.where(scored, drawn, self.codec.eos))
        self.ending.copy_(self.active & (self.next == self.codec.eos))
        chosen = logits.gather(1, self.next[:, None])[:, 0] - logits.logsumexp(1)
        self.tokens.index_copy_(1, self.number, self.next[:, None])
        self.mask.index_copy_(1, self.number, scored[:, None])
        self.logps.index_copy_(1, self.number, torch.where(scored, chosen, 0.0)[:, None])
        self.number += 1

    def texts(self) -> TextSegment:
        """What was drawn."""
        used = int(self.mask.sum(1).max())
        tokens, mask, logps = (x[:, :used] for x in (self.tokens, self.mask, self.logps))
        texts = tuple(
            self.codec.decode([i for i, sampled in zip(row, kept, strict=True) if sampled])
            for row, kept in zip(tokens.tolist(), mask.tolist(), strict=True)
        )
        return TextSegment(tokens, mask, logps, texts)


class _Graphs:
    """A group's turns as CUDA graphs. The first turn of each width runs as it is, which also warms
    its kernels up; then the turn is recorded, and from the second on replayed."""

    def __init__(self, group: _Group) -> None:
        self._group = group
        self._of: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()  # one graph runs at a time, and leaves nothing

    def turn(self, seen: int) -> None:
        if seen in self._of:
            self._of[seen].replay()
            return
        self._run(seen)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._run(seen)
        self._of[seen] = graph

    def _run(self, seen: int) -> None:
        # A cast that autocast remembers would be made once, outside of the graph.
        device = self._group.place.device.type
        on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        with torch.autocast(device, dtype, enabled=on, cache_enabled=False):
            self._group.feed(seen)
            self._group.draw()
