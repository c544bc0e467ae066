"""Loading a pipeline's components by their own ``from_pretrained``, and what painters do alike with
them. diffusers is imported by whoever calls, after :func:`need_diffusers`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unigrpo_core.errors import UserError
from unigrpo_core.loading import said

MEGAPIXEL = 1 << 20
WORDS = ("tokenizer.json", "vocab.json", "spiece.model")
"""A tokenizer's folder has one of these; without any, transformers makes one that knows no word."""

Overlong = Literal["error", "cut"]


def need_diffusers(policy: str) -> None:
    """Whether diffusers is there.

    Raises:
        UserError: it is not installed.
    """
    try:
        there = find_spec("diffusers") is not None
    except ValueError:
        there = False
    if not there:
        raise UserError(f'policy {policy!r} needs diffusers: pip install "unigrpo[diffusers]"')


def load_model(kind: Any, path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A component with its weights, frozen and in evaluation mode.

    Raises:
        UserError: its files are missing, damaged, or of another model; a weight that a file lacks
            is never drawn instead.
    """
    ours = kind.__module__.startswith("transformers.")
    options: dict[str, Any] = {"dtype" if ours else "torch_dtype": dtype}
    try:
        with torch.random.fork_rng(devices=[]):  # weights that are filled in later are drawn first
            model, info = kind.from_pretrained(
                str(path),
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # two libraries' own errors are of many kinds
        raise UserError(f"{path} cannot be loaded as {kind.__name__}: {said(error)}") from error
    lost = [*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"])]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise UserError(
            f"{path} is no whole {kind.__name__}: missing or misshapen are "
            f"{', '.join(lost[:3])}{more}"
        )
    model.requires_grad_(False)
    return model.eval().to(device)


def load_tokenizer(kind: Any, path: Path) -> Any:
    """A tokenizer, as it was saved.

    Raises:
        UserError: its files are missing or damaged.
    """
    if not any((path / name).is_file() for name in WORDS):
        raise UserError(
            f"{path} cannot be loaded as {kind.__name__}: it has none of {', '.join(WORDS)}"
        )
    try:
        return kind.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # as above
        raise UserError(f"{path} cannot be loaded as {kind.__name__}: {said(error)}") from error


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A text encoder's tokenizer: texts are padded to ``limit`` tokens, special ones counted."""

    name: str
    tokenizer: Any
    limit: int
    overlong: Overlong

    def taken(self, text: str) -> int:
        """All the tokens of a text."""
        return len(self.tokenizer(text, verbose=False).input_ids)

    def cut(self, text: str) -> int | None:
        """How many of them the encoder does not read; None: no text is to be cut."""
        return None if self.overlong == "error" else max(0, self.taken(text) - self.limit)

    def count(self, text: str) -> int:
        """The tokens of a text that the encoder reads.

        Raises:
            UserError: it takes more than the limit, and is not to be cut.
        """
        count = self.taken(text)
        if count > self.limit and self.overlong == "error":
            raise UserError(
                f"a text takes {count} tokens in {self.name}, whose encoder takes {self.limit}: "
                f'{text[:80]!r}; shorten it, or set overlong = "cut" beside the checkpoint, to '
                "leave out its end, as diffusers does, and have that counted"
            )
        return min(count, self.limit)

    def ids(self, text: str, device: torch.device) -> Tensor:
        """int64 [1, limit].

        Raises:
            UserError: as :meth:`count`.
        """
        return self.padded(text, device)[0]

    def padded(self, text: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """The ids, and the mask of those that are not padding, int64 [1, limit].

        Raises:
            UserError: as :meth:`count`.
        """
        self.count(text)
        found = self.tokenizer(
            [text],
            padding="max_length",
            max_length=self.limit,
            truncation=True,
            return_tensors="pt",
            verbose=False,
        )
        return found.input_ids.to(device), found.attention_mask.to(device)


def grid_of(size: tuple[int, int], stride: int, limit: int | None = None) -> tuple[int, int]:
    """The rows and columns of tokens of ``stride`` pixels in an image of (height, width).

    Raises:
        UserError: a side is no multiple of the stride, or has more than ``limit`` tokens.
    """
    for name, side in zip(("height", "width"), size, strict=True):
        if side % stride or side < stride or (limit is not None and side > limit * stride):
            most = "" if limit is None else f" up to {limit * stride}"
            raise UserError(
                f"image {name} {side}: this model draws multiples of {stride} pixels{most}"
            )
    return size[0] // stride, size[1] // stride


def vae_stride(autoencoder: Any) -> int:
    """Pixels of a latent's side."""
    config = autoencoder.config
    stages = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    return int(2 ** (len(stages) - 1))


@torch.no_grad()
def decode_images(autoencoder: Any, latents: Tensor) -> Tensor:
    """float32 [B, 3, H, W] in [0, 1] of latents [B, C, h, w] by an autoencoder that takes
    latents / scaling_factor + shift_factor and gives [-1, 1]. A megapixel at a time, since a
    decoder's activations are large."""
    config = autoencoder.config
    latents = latents.float() / config.scaling_factor + (config.get("shift_factor") or 0.0)
    pixels = latents[0, 0].numel() * vae_stride(autoencoder) ** 2
    parts = torch.split(latents, max(1, MEGAPIXEL // pixels))
    images = [autoencoder.decode(part, return_dict=False)[0] for part in parts]
    return (torch.cat(images) * 0.5 + 0.5).clamp(0, 1)


def moved(modules: Sequence[nn.Module], device: torch.device) -> None:
    for module in modules:
        module.to(device)
