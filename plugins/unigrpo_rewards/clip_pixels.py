"""From images to what a CLIP vision encoder reads, as CLIP's processor does it, in torch.

Mathematics
    shorter side to ``edge`` (the longer to int(edge * long / short)) by PIL's bicubic filter,
    columns before rows; the middle ``side`` x ``side``; (x - mean) / std per channel.

Convention
    Values are rounded to bytes wherever PIL holds bytes; see :mod:`unigrpo_rewards.pickscore`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unigrpo_core.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


@dataclass(frozen=True)
class Pixels:
    """[B, 3, H, W] in [0, 1] to float32 [B, 3, side, side], normalised."""

    edge: int
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        from torch.nn.functional import interpolate

        height, width = images.shape[-2:]
        short, long = min(height, width), max(height, width)
        longer = int(self.edge * long / short)
        rows, columns = (longer, self.edge) if height > width else (self.edge, longer)
        values = in_bytes(images.float())
        for size in ((height, columns), (rows, columns)):
            if values.shape[-2:] != size:
                values = in_bytes(interpolate(values, size, mode="bicubic", antialias=True))
        top, left = (rows - self.side) // 2, (columns - self.side) // 2
        values = values[..., top : top + self.side, left : left + self.side]
        mean, std = (values.new_tensor(item)[:, None, None] for item in (self.mean, self.std))
        return (values - mean) / std


def in_bytes(values: Tensor) -> Tensor:
    """Values in [0, 1] rounded to multiples of 1/255; the gradient passes straight through."""
    bounded = values.clamp(0, 1)
    return bounded + ((bounded * 255).round() / 255 - bounded).detach()


def read_pixels(path: Path) -> Pixels:
    """The processor that a ``preprocessor_config.json`` describes.

    Raises:
        UserError: the file cannot be read, or describes another pipeline than CLIP's.
    """
    try:
        config: dict[str, Any] = json.loads(path.read_text("utf-8"))
        size, crop = config["size"], config["crop_size"]
        edge = size["shortest_edge"] if isinstance(size, dict) else size
        sides = {crop["height"], crop["width"]} if isinstance(crop, dict) else {crop}
        mean, std = tuple(config["image_mean"]), tuple(config["image_std"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a CLIP image processor's configuration ({type(error).__name__}: {error})"
            '; it states "size": {"shortest_edge": N}, "crop_size", "image_mean" and "image_std"'
        ) from error
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    same = (
        all(config.get(step, True) is True for step in steps)
        and config.get("resample", BICUBIC) == BICUBIC
        and abs(config.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-6
        and len(sides) == 1
        and all(isinstance(number, int) for number in (edge, *sides))
        and 0 < max(sides) <= edge
        and len(mean) == len(std) == 3
        and all(isinstance(number, float | int) for number in (*mean, *std))
        and all(number > 0 for number in std)
    )
    if not same:
        raise UserError(
            f"{path}: another pipeline than CLIP's, which resizes the shorter side (bicubic), cuts "
            f"the middle square out and normalises; got size {size}, crop_size {crop}, resample "
            f"{config.get('resample')}, {', '.join(f'{s} {config.get(s)}' for s in steps)}, "
            f"rescale_factor {config.get('rescale_factor')}, mean {mean}, std {std}"
        )
    return Pixels(edge, max(sides), mean, std)
