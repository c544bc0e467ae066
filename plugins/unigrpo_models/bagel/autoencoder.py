"""The autoencoder of FLUX.1, as BAGEL ships it in ``ae.safetensors``.

Modules have the names of the published file. It is written here, not taken from diffusers, since
diffusers' ``AutoencoderKL`` gives the encoder's first convolution the width of the first level,
which is the same at the released sizes only.

Shapes: images [B, 3, H, W] in [-1, 1], latents [B, z, H / f, W / f], where f halves as often as
there are levels below the first (8). GroupNorm has 32 groups, so every width is a multiple of 32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unigrpo_core.errors import UserError
from unigrpo_models.bagel.layout import AUTOENCODER
from unigrpo_models.reading import check_fit, read, shapes_of
from unigrpo_models.stored import Stored

FOREIGN = "is no FLUX autoencoder"
SCALE, SHIFT = 0.3611, 0.1159
FACTOR = 8
PIXELS = 2**20  # decoded at once


@dataclass(frozen=True)
class Sizes:
    """What the tensors' shapes tell. Widths are those of the levels, finest first."""

    first: int
    widths: tuple[int, ...]
    blocks: int
    latent: int

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Sizes:
        """Raises KeyError where a tensor that tells a size is not there."""
        levels = _count(shapes, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
        blocks = _count(shapes, r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight")
        return cls(
            shapes["encoder.conv_in.weight"][0],
            tuple(shapes[f"encoder.down.{n}.block.0.conv1.weight"][0] for n in range(levels)),
            blocks,
            shapes["decoder.conv_in.weight"][1],
        )


def _count(names: Mapping[str, object], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in names)


class Norm(nn.GroupNorm):
    def __init__(self, width: int) -> None:
        super().__init__(32, width, eps=1e-6)


def _conv(inside: int, outside: int) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, padding=1)


class ResBlock(nn.Module):
    """Two convolutions beside a way around them, 1 x 1 where the width changes."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = Norm(inside), _conv(inside, outside)
        self.norm2, self.conv2 = Norm(outside), _conv(outside, outside)
        if inside != outside:
            self.nin_shortcut = nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        around = self.nin_shortcut(x) if "nin_shortcut" in self._modules else x
        total: Tensor = around + y
        return total


class AttentionBlock(nn.Module):
    """One head over all positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (
            part(normed).flatten(2).mT.contiguous()[:, None] for part in (self.q, self.k, self.v)
        )
        seen = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape)
        y: Tensor = x + self.proj_out(seen)
        return y


class Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.attn_1 = ResBlock(width, width), AttentionBlock(width)
        self.block_2 = ResBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return y


class Downsample(nn.Module):
    """Halves the sides; the padding is on the right and below only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return y


class Upsample(nn.Module):
    """Doubles the sides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return y


class Level(nn.Module):
    """The residual blocks of one resolution, and the way to the next one, if there is one."""

    def __init__(self, inside: int, outside: int, blocks: int, after: str) -> None:
        super().__init__()
        each = [ResBlock(inside if n == 0 else outside, outside) for n in range(blocks)]
        self.block, self.after = nn.ModuleList(each), after
        if after:
            kinds = {"downsample": Downsample, "upsample": Upsample}
            self.add_module(after, kinds[after](outside))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        y: Tensor = self.get_submodule(self.after)(x) if self.after else x
        return y


class Encoder(nn.Module):
    """Images to moments [B, 2 z, h, w]: means, then log-variances."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        inside, last = (sizes.first, *sizes.widths), len(sizes.widths) - 1
        self.conv_in = _conv(3, sizes.first)
        self.down = nn.ModuleList(
            Level(inside[n], width, sizes.blocks, "downsample" if n < last else "")
            for n, width in enumerate(sizes.widths)
        )
        self.mid = Middle(sizes.widths[-1])
        self.norm_out = Norm(sizes.widths[-1])
        self.conv_out = _conv(sizes.widths[-1], 2 * sizes.latent)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        y: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return y


class Decoder(nn.Module):
    """The way back; level n of ``up`` has the resolution of level n of ``down``."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        inside = (*sizes.widths[1:], sizes.widths[-1])
        self.conv_in = _conv(sizes.latent, sizes.widths[-1])
        self.mid = Middle(sizes.widths[-1])
        self.up = nn.ModuleList(
            Level(inside[n], width, sizes.blocks + 1, "upsample" if n else "")
            for n, width in enumerate(sizes.widths)
        )
        self.norm_out = Norm(sizes.widths[0])
        self.conv_out = _conv(sizes.widths[0], 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        y: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return y


class Autoencoder(nn.Module):
    """Frozen: it is never trained, and no part of the trainable root."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder, self.decoder = Encoder(sizes), Decoder(sizes)
        self.requires_grad_(False)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """float32 mean and standard deviation [B, z, h, w] of the latents before scaling."""
        with _exact():
            moments = self.encoder(images.to(self.encoder.conv_in.weight.dtype)).float()
        mean, logvar = moments.chunk(2, 1)
        return mean, (0.5 * logvar).exp()

    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """float32 latents drawn with ``noise`` [B, z, h, w], standard normal."""
        mean, std = self.moments(images)
        return SCALE * (mean + std * noise - SHIFT)

    def decode(self, latents: Tensor) -> Tensor:
        """float32 images of latents, not clamped; at most ``PIXELS`` of them at once."""
        latents = (latents / SCALE + SHIFT).to(self.decoder.conv_in.weight.dtype)
        pixels = latents[0, 0].numel() * FACTOR**2
        chunks = torch.split(latents, max(1, PIXELS // pixels))
        with _exact():
            return torch.cat([self.decoder(chunk) for chunk in chunks]).float()


@contextmanager
def _exact() -> Iterator[None]:
    """Convolutions of float32 are that, where cuDNN would by default take TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def read_autoencoder(
    folder: Path, channels: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """The autoencoder of a checkpoint folder, every tensor read straight to its device.

    Raises:
        UserError: the file is missing or damaged, a tensor is missing, unexpected or misshapen, or
            the latents have not ``channels`` channels or are not 8 times smaller than the image.
    """
    if not (folder / AUTOENCODER).exists():
        raise UserError(f"{folder} has no {AUTOENCODER}, which decodes what this model draws")
    stored = Stored(folder / AUTOENCODER)
    try:
        autoencoder = _empty(stored)
        sizes, wanted = autoencoder.sizes, shapes_of(autoencoder.state_dict())
        check_fit(stored, wanted, FOREIGN)
        if sizes.latent != channels or len(sizes.widths) != 4:
            factor = 2 ** (len(sizes.widths) - 1)
            raise UserError(
                f"{stored.path}: latents of {sizes.latent} channels, {factor} times smaller than "
                f"the image; the model takes {channels} channels, {FACTOR} times smaller"
            )
        state = read(stored, wanted, device, lambda name: dtype)
    finally:
        stored.close()
    autoencoder.load_state_dict(state, assign=True)
    return autoencoder.requires_grad_(False)


def _empty(stored: Stored) -> Autoencoder:
    """An autoencoder without weights, of the sizes that a file's tensors tell."""
    try:
        with torch.device("meta"):
            return Autoencoder(Sizes.of({name: x.shape for name, x in stored.entries.items()}))
    except KeyError as error:
        raise UserError(f"{stored.path} {FOREIGN}: missing {error.args[0]}") from error
    except (IndexError, ValueError) as error:
        raise UserError(f"{stored.path} {FOREIGN}: {error}") from error
