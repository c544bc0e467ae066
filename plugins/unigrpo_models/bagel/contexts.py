"""Contexts: reading texts into a history, going on from one, and what guidance's branches stand on.

Rows are padded on the right. Who calls decides on the type to compute in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unigrpo_core.errors import UserError
from unigrpo_models.bagel.history import BagelHistory, empty_history
from unigrpo_models.bagel.network import BagelNetwork, Before
from unigrpo_models.bagel.tokens import Codec, empty_slots, pad


def read(
    network: BagelNetwork,
    codec: Codec,
    rows: Sequence[Sequence[int]],
    told: Sequence[Sequence[int]],
    free: Sequence[int],
) -> BagelHistory:
    """The history of texts, in one causal pass; ``told`` and ``free`` as in the history."""
    device = network.latent_pos_embed.pos_embed.device
    if not any(rows):
        return empty_history(network.config.llm, len(rows), device)
    _, caches = network.text(pad(rows, codec.eos, device), want_hidden=False)
    ids, told = (tuple(tuple(row) for row in each) for each in (rows, told))
    return BagelHistory(tuple(caches), ids, told, tuple(free))


def continued(
    network: BagelNetwork, codec: Codec, history: BagelHistory, texts: Sequence[Sequence[int]]
) -> BagelHistory:
    """The history with a text appended to each row: all in one pass where there is only text, as
    the trainer will read it; else in one over what is there."""
    if not history.has_images:
        whole = [[*a, *b] for a, b in zip(history.texts, texts, strict=True)]
        return read(network, codec, whole, history.told, history.free)
    slots = history.caches[0][0]
    device, width = slots.device, slots.shape[2]
    before = Before(
        list(history.caches),
        torch.tensor(history.positions, device=device),
        empty_slots(history.lengths, width).to(device),
    )
    _, caches = network.text(pad(texts, codec.eos, device), before, want_hidden=False)
    return history.appended([(k[:, :, width:], v[:, :, width:]) for k, v in caches], texts)


def unconditional(
    network: BagelNetwork, codec: Codec, history: BagelHistory, name: str
) -> BagelHistory:
    """What a branch of guidance stands on. "text": what stands before the last prompt, or up to the
    last image if that came later; "image": system prompt and prompts, without thoughts and images.

    Raises:
        UserError: there is no such branch.
    """
    if name == "image":
        return read(network, codec, history.told, history.told, history.free)
    if name != "text":
        raise UserError(f'bagel has no unconditional context {name!r}; it has "text" and "image"')
    if codec.blank:
        slots = history.caches[0][0]
        return empty_history(network.config.llm, len(history), slots.device)
    before = history.filled(history.unprompted)
    if before.has_images:
        return before
    return read(network, codec, before.texts, before.told, before.free)
