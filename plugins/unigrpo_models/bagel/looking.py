"""Looking at images: a block of clean latents, then one of what the ViT sees.

Each block is [vision_start] image [vision_end] at one position, sees all that stands before it and
all of itself, and stays in the cache. The generation expert processes the latents, at t = 0, the
understanding expert all else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unigrpo_core.errors import UserError
from unigrpo_core.keys import Key, normals
from unigrpo_models.bagel.autoencoder import FACTOR, Autoencoder
from unigrpo_models.bagel.config import BagelConfig
from unigrpo_models.bagel.history import BagelHistory, Look
from unigrpo_models.bagel.latents import patchify
from unigrpo_models.bagel.network import (
    GEN,
    UND,
    BagelNetwork,
    LayerCache,
    attend_all,
    rotary,
)
from unigrpo_models.bagel.tokens import Codec, empty_slots, padding_mask

LookAt = Literal["vae_vit", "vit"]

AREA = 14 * 14 * 9 * 1024
SHORTEST = 16  # patches of the ViT along the shorter side


@dataclass(frozen=True)
class Resize:
    """BAGEL's rule for the size at which an image is looked at: sides are multiples of ``stride``,
    the longer one at most ``longest``, the shorter one, where that allows it, at least
    ``shortest`` pixels."""

    stride: int
    shortest: int
    longest: int

    def size(self, height: int, width: int) -> tuple[int, int]:
        factor = min(self.longest / max(height, width), 1.0)
        size = self._scaled((height, width), max(factor, self.shortest / min(height, width)))
        if math.prod(size) > AREA:
            size = self._scaled(size, AREA / math.prod(size))  # by the area, not by its root
        if max(size) > self.longest:
            size = self._scaled(size, self.longest / max(size))
        return size

    def _scaled(self, size: tuple[int, int], factor: float) -> tuple[int, int]:
        q = self.stride
        height, width = (max(q, round(round(side * factor) / q) * q) for side in size)
        return height, width

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], bicubic with antialiasing as in PIL, but not rounded to
        8 bits; as they are if they fit."""
        old = (images.shape[2], images.shape[3])
        size = self.size(*old)
        if size == old:
            return images
        resized = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
        return resized.clamp(0, 1)


def latent_resize(config: BagelConfig) -> Resize:
    """The rule before the autoencoder, which is also the one for what is drawn from an image: at
    the released sizes 512 to 1024 pixels in steps of 16."""
    longest = config.latent.stride * config.latent.max_size
    return Resize(config.latent.stride, longest // 2, longest)


def vit_resize(config: BagelConfig) -> Resize:
    """The rule before the ViT, on top of the other: at the released sizes 224 to 980 in steps of
    14."""
    assert config.vit is not None
    patch, longest = config.vit.patch_size, config.vit.side * config.vit.patch_size
    return Resize(patch, min(SHORTEST * patch, longest), longest)


def look_at(
    network: BagelNetwork,
    codec: Codec,
    autoencoder: Autoencoder | None,
    history: BagelHistory,
    images: Tensor,
    keys: Sequence[Key],
    mode: LookAt,
) -> BagelHistory:
    """``history`` with images [B, 3, H, W] in [0, 1] looked at. Image b's latents are the
    autoencoder's mean plus its standard deviation times the normal draw
    ``keys[b].child("encode")`` [z, h, w].

    Raises:
        UserError: the model has no ViT, or a row would be longer than its context.
    """
    config = network.config
    if config.vit is None:
        raise UserError(
            "this checkpoint does not look at images: its folder has no vit_config.json"
        )
    saw = [_digest(image) for image in images]
    images = latent_resize(config)(images)
    if mode == "vae_vit":
        pixels = 2 * images - 1
        if autoencoder is not None:
            height, width = (side // FACTOR for side in images.shape[2:])
            shape = (autoencoder.sizes.latent, height, width)
            noise = normals([key.child("encode") for key in keys], shape, images.device)
            with torch.autocast(images.device.type, enabled=False):
                pixels = autoencoder.encode(pixels, noise)
        latents = patchify(config.latent, pixels)
        drawn = [one + repr(key.path).encode() for one, key in zip(saw, keys, strict=True)]
        history = append_latents(network, codec, history, latents, drawn)
    return append_views(network, codec, history, 2 * vit_resize(config)(images) - 1, saw)


def append_latents(
    network: BagelNetwork,
    codec: Codec,
    history: BagelHistory,
    latents: Tensor,
    saw: Sequence[bytes],
) -> BagelHistory:
    """With a block of clean latents [B, h, w, token] per row; ``saw`` tells equal ones."""
    places = network.table_rows(*latents.shape[1:3])
    clean = torch.zeros(len(latents), device=latents.device)
    inner = network.embed_latents(latents.flatten(1, 2), clean, places)
    return _append(network, codec, history, inner, latents, saw, GEN)


def append_views(
    network: BagelNetwork,
    codec: Codec,
    history: BagelHistory,
    pixels: Tensor,
    saw: Sequence[bytes],
) -> BagelHistory:
    """With a block per row of what the ViT sees of pixels [B, 3, H, W] in [-1, 1]; ``saw`` tells
    equal ones."""
    return _append(network, codec, history, network.embed_image(pixels), pixels, saw, UND)


def _append(
    network: BagelNetwork,
    codec: Codec,
    history: BagelHistory,
    inner: Tensor,
    content: Tensor,
    saw: Sequence[bytes],
    expert: str,
) -> BagelHistory:
    count = inner.shape[1] + 2
    total = max(history.lengths) + count
    if total > codec.max_length:
        raise UserError(
            f"an image of {count - 2} tokens makes a context of {total}; the model's ends at "
            f"{codec.max_length}"
        )
    looks = [[Look(count, expert.encode() + s, x)] for s, x in zip(saw, content, strict=True)]
    longer = history.appended(_block(network, codec, history, inner, expert), looks)
    return replace(longer, free=longer.positions)


def _digest(image: Tensor) -> bytes:
    data = image.contiguous().cpu().numpy().tobytes()
    return blake2b(f"{tuple(image.shape)}".encode() + data, digest_size=16).digest()


def _block(
    network: BagelNetwork, codec: Codec, history: BagelHistory, inner: Tensor, expert: str
) -> list[LayerCache]:
    """Per layer the keys and values [B, Hk, N + 2, d] of blocks around ``inner`` [B, N, D]."""
    device = inner.device
    boundary = torch.tensor([[codec.image_start, codec.image_end]], device=device)
    edge = network.embed(boundary).expand(len(inner), -1, -1)
    inner = inner.to(edge.dtype)
    positions = torch.tensor(history.positions, device=device)
    rope = rotary(positions[:, None], network.config.llm, edge.dtype)
    hidden = empty_slots(history.lengths, history.caches[0][0].shape[2])
    padding = padding_mask(hidden, inner.shape[1] + 2, device)
    block: list[LayerCache] = []
    for layer, past in zip(network.layers, history.caches, strict=True):
        attention = layer.self_attn
        outside, inside = layer.normed(edge, UND), layer.normed(inner, expert)
        k, v = (
            torch.cat((around[:, :, :1], own, around[:, :, 1:]), 2)
            for around, own in zip(
                attention.entry(outside, UND), attention.entry(inside, expert), strict=True
            )
        )
        block.append((rope(k), v))
        if layer is network.layers[-1]:
            break
        q = rope(torch.cat((attention.query(outside, UND), attention.query(inside, expert)), 2))
        keys, values = (torch.cat(both, 2) for both in zip(past, block[-1], strict=True))
        seen = attend_all(q, keys, values, padding)
        edge = layer.finish(edge, seen[:, :, :2], UND)
        inner = layer.finish(inner, seen[:, :, 2:], expert)
    return block
