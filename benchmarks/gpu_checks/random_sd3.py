"""A random painter of Stable Diffusion 3's kind, made on the device. Needs diffusers."""

from __future__ import annotations

import gc
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import nn
from unigrpo_models.adapters import Lora
from unigrpo_models.painters.folder import PipelineFolder, Shift
from unigrpo_models.painters.options import SD3Options
from unigrpo_models.painters.painter import Condition
from unigrpo_models.painters.parts import Tokenizer
from unigrpo_models.painters.policy import PainterPolicy
from unigrpo_models.painters.sd3 import SD3Painter

from gpu_checks.scales import Painted, Scale
from unigrpo_core.plugin import Placement


class RandomSD3(SD3Painter):
    """Without text encoders: what they would make of a text is drawn, in their shapes and type."""

    def __init__(self, painted: Painted, place: Placement, network: nn.Module, pixels: Any) -> None:
        words = [Tokenizer("clip", None, painted.text[0], "cut")]
        options = SD3Options(checkpoint="random", max_text_tokens=painted.text[1])
        folder = PipelineFolder(Path("random"), Shift({"shift": 3.0}), frozenset())
        super().__init__(folder, place, network, words, (), None, pixels, options)
        self._long = sum(painted.text)

    def text_tokens(self, text: str) -> int:
        return self._long

    def cut_tokens(self, text: str) -> Mapping[str, int]:
        return {}

    def read(self, text: str) -> Condition:
        device, dtype, config = self.place.device, self.place.compute, self._config
        generator = torch.Generator(device).manual_seed(zlib.crc32(text.encode()))
        shapes = {
            "text": (1, self._long, config.joint_attention_dim),
            "pooled": (1, config.pooled_projection_dim),
        }
        return {
            name: torch.randn(shape, device=device, dtype=dtype, generator=generator)
            for name, shape in shapes.items()
        }


def random_sd3(scale: Scale, place: Placement) -> PainterPolicy:
    """A policy with weights from N(0, .02), norms 1, and the autoencoder as its library draws it;
    adapters are trained, on what is customary."""
    gc.collect()  # of models before it, which hold references to themselves
    painted = scale.painter
    with torch.device("meta"):
        network = SD3Transformer2DModel(**painted.transformer)
    network = network.to(place.compute).to_empty(device=place.device)
    generator = torch.Generator(place.device).manual_seed(0)
    with torch.no_grad():
        for name, weight in (*network.named_parameters(), *network.named_buffers()):
            if "norm_" in name and name.endswith("weight") and weight.ndim == 1:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, 0.02, generator=generator)
    with torch.device(place.device), torch.random.fork_rng():
        pixels = AutoencoderKL(**painted.autoencoder)
    for frozen in (network, pixels):
        frozen.requires_grad_(False).eval()
    painter = RandomSD3(painted, place, network, pixels)
    targets = {"image": SD3Painter.targets}
    lora = Lora(painted.lora_rank, 2 * painted.lora_rank, targets) if place.train else None
    return PainterPolicy(painter, place, lora=lora)
