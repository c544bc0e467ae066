"""Loading a pipeline's components by their own ``from_pretrained``, and what painters do alike with
them. diffusers is imported by whoever calls, after :func:`need_diffusers`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unigrpo_core.errors import UserError
from unigrpo_core.loading import said
from unigrpo_models.painters.folder import stride_of

MEGAPIXEL = 1 << 20
WORDS = ("tokenizer.json", "vocab.json", "spiece.model")
"""A tokenizer's folder has one of these; without any, transformers makes one that knows no word."""

Overlong = Literal["error", "cut"]


def need_diffusers(policy: str, minor: int = 35) -> None:
    """Whether diffusers 0.``minor`` is there.

    Raises:
        UserError: it is not installed, or is older.
    """
    try:
        there = find_spec("diffusers") is not None
    except ValueError:
        there = False
    if not there:
        raise UserError(f'policy {policy!r} needs diffusers: pip install "unigrpo[diffusers]"')
    found = version("diffusers")
    if tuple(int(part) for part in found.split(".")[:2]) < (0, minor):
        raise UserError(
            f"policy {policy!r} needs diffusers 0.{minor} or later, and {found} is installed: "
            f'pip install "diffusers>=0.{minor}"'
        )


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
    """A text encoder's tokenizer: texts are padded to ``limit`` tokens, special ones counted.

    Args:
        template: what a text is told in, by ``str.format``.
        dropped: how many tokens at the beginning are the template's; the limit is of those behind.
    """

    name: str
    tokenizer: Any
    limit: int
    overlong: Overlong
    template: str = "{}"
    dropped: int = 0

    def taken(self, text: str) -> int:
        """All the tokens of a text, those of the template that are read counted."""
        told = self.template.format(text)
        return len(self.tokenizer(told, verbose=False).input_ids) - self.dropped

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
        """int64 [1, dropped + limit].

        Raises:
            UserError: as :meth:`count`.
        """
        return self.padded(text, device)[0]

    def padded(self, text: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """The ids, and the mask of those that are not padding, int64 [1, dropped + limit].

        Raises:
            UserError: as :meth:`count`.
        """
        self.count(text)
        found = self.tokenizer(
            [self.template.format(text)],
            padding="max_length",
            max_length=self.dropped + self.limit,
            truncation=True,
            return_tensors="pt",
            verbose=False,
        )
        return found.input_ids.to(device), found.attention_mask.to(device)


def unpacked(tokens: Tensor, patch: int) -> Tensor:
    """Latents [B, c, h patch, w patch] of tokens [B, h, w, c patch^2], each (channel, row in patch,
    column)."""
    rows, height, width, channels = tokens.shape
    x = tokens.reshape(rows, height, width, channels // patch**2, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(rows, -1, height * patch, width * patch)


def vae_stride(autoencoder: Any) -> int:
    """Pixels of a latent's side."""
    return stride_of(autoencoder.config)


def decode_images(autoencoder: Any, latents: Tensor) -> Tensor:
    """float32 [B, 3, H, W] in [0, 1] of latents [B, C, h, w] by an autoencoder that takes
    latents / scaling_factor + shift_factor, or where it has neither latents * latents_std +
    latents_mean by channel, and gives [-1, 1]. With a third axis, of frames, so have the images. A
    megapixel at a time, since a decoder's activations are large."""
    config = autoencoder.config
    if config.get("scaling_factor") is None:
        of_channel = (1, -1, *[1] * (latents.dim() - 2))
        std, mean = (torch.tensor(config[f"latents_{name}"]) for name in ("std", "mean"))
        latents = latents.float() * std.to(latents.device).view(of_channel)
        latents = latents + mean.to(latents.device).view(of_channel)
    else:
        latents = latents.float() / config.scaling_factor + (config.get("shift_factor") or 0.0)
    pixels = latents[0, 0].numel() * vae_stride(autoencoder) ** 2
    parts = torch.split(latents, max(1, MEGAPIXEL // pixels))
    images = [autoencoder.decode(part, return_dict=False)[0] for part in parts]
    return (torch.cat(images) * 0.5 + 0.5).clamp(0, 1)


def moved(modules: Sequence[nn.Module], device: torch.device) -> None:
    for module in modules:
        module.to(device)
