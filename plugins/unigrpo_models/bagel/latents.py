"""Images and latents: ``*`` is (h, w, token), a grid of tokens whose shape tells the size."""

from __future__ import annotations

from torch import Tensor

from unigrpo_core.errors import UserError
from unigrpo_models.bagel.config import Latent


def latent_shape(config: Latent, size: tuple[int, int]) -> tuple[int, int, int]:
    """(h, w, token) of an image of (height, width) pixels.

    Raises:
        UserError: a side is no multiple of the token's, or beyond the position table.
    """
    stride, limit = config.stride, config.stride * config.max_size
    for name, side in zip(("height", "width"), size, strict=True):
        if side % stride or not 0 < side <= limit:
            raise UserError(
                f"image {name} {side}: this model draws multiples of {stride} pixels up to {limit}"
            )
    return size[0] // stride, size[1] // stride, config.token_width


def patchify(config: Latent, grid: Tensor) -> Tensor:
    """[B, h, w, token] of a grid [B, C, h p, w p]; a token is (row in patch, column, channel)."""
    return patches(config.patch, grid)


def patches(p: int, grid: Tensor) -> Tensor:
    """[B, h, w, p p C] of a grid [B, C, h p, w p], in the order (row in patch, column, channel)."""
    rows, channels, height, width = grid.shape
    x = grid.reshape(rows, channels, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3)


def unpatchify(config: Latent, tokens: Tensor) -> Tensor:
    """The inverse of :func:`patchify`."""
    rows, height, width, _ = tokens.shape
    p = config.patch
    x = tokens.view(rows, height, width, p, p, config.channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(rows, config.channels, height * p, width * p)
