"""The one gradient path: the trainer's pass over a replay batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unigrpo_core.records import Replay, ReplayBatch
from unigrpo_models.bagel.history import empty_history
from unigrpo_models.bagel.network import BagelNetwork, Before, LayerCache
from unigrpo_models.bagel.tokens import Codec, empty_slots, pad, padding_mask
from unigrpo_models.sampling import scaled_logits

Ids = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Texts:
    """What was read: contexts and thoughts, or the thoughts after shared contexts."""

    states: Tensor | None  # [B, L, D], final hidden states of what may be predicted from
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
        self.allowed: Tensor
        self.register_buffer("allowed", codec.allowed(self.device), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.network.vae2llm.weight.device

    def forward(self, batch: ReplayBatch) -> Replay:
        device = batch.tokens.device
        with torch.autocast(device.type, self.compute, enabled=self.compute != torch.float32):
            contexts = [tuple(self.codec.context(prompt)) for prompt in batch.prompts]
            written = self.codec.thoughts(batch.tokens.tolist(), batch.mask.tolist())
            rows = [*zip(contexts, map(tuple, written), strict=True)]
            texts = self._read(list(dict.fromkeys(rows)), batch.want_logps)
            owner = index_of(rows)
            logps = self._logps(batch, texts, owner)
            if batch.x_t is None or batch.t is None:
                return Replay(logps, None, {})
            velocities = self._velocities(batch, texts, owner)
            branches = {name: self._branch(batch, name) for name in batch.branches}
        return Replay(logps, velocities, branches)

    def _read(self, rows: Sequence[tuple[Ids, Ids]], want_states: bool) -> _Texts:
        """Different contexts with their thoughts. In float32 a context that several thoughts share
        is computed once; in a coarser type every text is one causal pass, as in sampling."""
        network, eos, device = self.network, self.codec.eos, self.device
        contexts, thoughts = [row[0] for row in rows], [row[1] for row in rows]
        lengths = [len(context) + len(thought) for context, thought in rows]
        if self.compute != torch.float32 or not any(thoughts):
            ids = pad([context + thought for context, thought in rows], eos, device)
            states, caches = network.text(ids, want_hidden=want_states)
            starts = [len(context) for context in contexts]
            return _Texts(states, starts, caches, lengths, empty_slots(lengths, ids.shape[1]))
        shared, index = list(dict.fromkeys(contexts)), index_of(contexts)
        ids = pad(shared, eos, device)
        _, caches = network.text(ids, want_hidden=False)
        sizes = [len(context) for context in contexts]
        hidden = empty_slots(sizes, ids.shape[1])
        before = Before(
            [(k[index], v[index]) for k, v in caches],
            torch.tensor(sizes, device=device),
            hidden.to(device),
        )
        ids = pad(thoughts, eos, device)
        states, caches = network.text(ids, before, want_hidden=want_states)
        own = empty_slots([len(thought) for thought in thoughts], ids.shape[1])
        return _Texts(states, [0] * len(rows), caches, lengths, torch.cat((hidden, own), 1))

    def _logps(self, batch: ReplayBatch, texts: _Texts, owner: list[int]) -> Tensor:
        if not batch.want_logps:
            return torch.zeros(batch.tokens.shape, device=batch.tokens.device)
        # Token j of a thought is predicted at the place before it; [bos] stands at its start.
        hidden = texts.states
        assert hidden is not None
        place = torch.tensor(texts.starts)[:, None] + torch.arange(batch.tokens.shape[1])
        place = place.clamp(max=hidden.shape[1] - 1).to(hidden.device)
        hidden = hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[2]))
        logits = scaled_logits(
            self.network.language_model.lm_head(hidden),
            self.allowed,
            batch.temperature,
        )
        tokens = batch.tokens.masked_fill(~batch.mask, self.codec.eos)
        unique = tokens[first_of(owner)]
        logps = logits.gather(2, unique[..., None])[..., 0] - logits.logsumexp(2)
        return torch.where(batch.mask, logps[owner], 0.0)

    def _velocities(self, batch: ReplayBatch, texts: _Texts, owner: list[int]) -> Tensor:
        assert batch.x_t is not None
        assert batch.t is not None
        caches = texts.caches
        if not batch.context_gradient:
            caches = [(k.detach(), v.detach()) for k, v in caches]
        v = image_velocity(
            self.network,
            self.codec,
            batch.x_t.flatten(0, 1),
            batch.t.flatten(),
            caches,
            texts.lengths,
            texts.hidden,
            [row for row in owner for _ in range(batch.x_t.shape[1])],
            frozen=not batch.context_gradient,
        )
        return v.view(batch.x_t.shape)

    def _branch(self, batch: ReplayBatch, name: str) -> Tensor:
        """Velocities over an unconditional context: "text", what stands before the prompt; "image",
        system prompt and prompt without the thought."""
        if name == "image":
            contexts = [tuple(self.codec.context(prompt)) for prompt in batch.prompts]
        else:
            assert name == "text", name
            contexts = [self.codec.unconditional] * len(batch.prompts)
        rows = list(dict.fromkeys(contexts))
        if any(rows):
            texts = self._read([(row, ()) for row in rows], want_states=False)
        else:
            nothing = empty_history(self.network.config.llm, 1, self.device)
            texts = _Texts(None, [0], list(nothing.caches), [0], empty_slots([0], 0))
        return self._velocities(batch, texts, index_of(contexts))


def image_velocity(
    network: BagelNetwork,
    codec: Codec,
    x_t: Tensor,
    t: Tensor,
    caches: list[LayerCache],
    lengths: list[int],
    hidden: Tensor | None = None,
    owner: Sequence[int] | None = None,
    *,
    positions: Sequence[int] | None = None,
    frozen: bool = False,
) -> Tensor:
    """Velocities [R, h, w, token] over texts, given by their caches and lengths: what the sampler
    and the trainer both call.

    Args:
        hidden: bool [C, L], the slots of the caches that hold nothing; by default those from each
            text's length on.
        owner: the text of each image; by default image r has text r.
        positions: where the image blocks of each text stand; by default at its length, which is
            right unless there are images in it.
    """
    device, (height, width) = x_t.device, x_t.shape[1:3]
    if hidden is None:
        hidden = empty_slots(lengths, caches[0][0].shape[2])
    if owner is None:
        owner = range(len(x_t))
    first, index = equal_images(owner, x_t, t)
    if len(first) < len(index):
        x_t, t, owner = x_t[first], t[first], [owner[row] for row in first]
    rows = None if list(owner) == list(range(len(lengths))) else list(owner)
    v = network.velocity(
        x_t.flatten(1, 2),
        t,
        network.table_rows(height, width),
        torch.tensor([[codec.image_start, codec.image_end]], device=device),
        torch.tensor(lengths if positions is None else positions, device=device),
        caches,
        padding_mask(hidden if rows is None else hidden[rows], height * width + 2, device),
        None if rows is None else torch.tensor(rows, device=device),
        frozen=frozen,
    ).view(x_t.shape)
    return v if len(first) == len(index) else v[index]


def equal_images(owner: Sequence[int], x_t: Tensor, t: Tensor) -> tuple[list[int], list[int]]:
    """A row of every different (text, time, latents), and for each row which of these it is.

    Thoughts that say the same of one prompt have the same image up to the first noise of their own:
    a policy that has learned says the same often. Latents are compared on a CPU only, where that
    is cheap.
    """
    if x_t.device.type != "cpu":
        return list(range(len(x_t))), list(range(len(x_t)))
    places = list(zip(owner, t.tolist(), strict=True))
    often = Counter(places)
    rows = [
        (place, x.numpy().tobytes() if often[place] > 1 else b"")
        for place, x in zip(places, x_t.detach(), strict=True)
    ]
    index = index_of(rows)
    return first_of(index), index


def index_of(rows: Sequence[Hashable]) -> list[int]:
    """The number of each row among the different ones, in the order in which they come."""
    number = {row: place for place, row in enumerate(dict.fromkeys(rows))}
    return [number[row] for row in rows]


def first_of(index: Sequence[int]) -> list[int]:
    """For each number that :func:`index_of` gave the first row that has it."""
    first = {number: row for row, number in reversed([*enumerate(index)])}
    return [first[number] for number in range(len(first))]
