"""The sizes that are measured: of models, batches and repetitions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from unigrpo_models.bagel.config import BagelConfig, LanguageConfig, Latent

from gpu_checks.harness import Pace

FILLED = 4096  # words that may be sampled, so that a random model seldom ends a thought


@dataclass(frozen=True)
class Step:
    """A UniGRPO step whose time is projected: samples on so many devices, of one image size."""

    name: str
    prompts: int
    chains: int
    size: str
    devices: int


@dataclass(frozen=True)
class Painted:
    """A painter of Stable Diffusion 3's kind, with what is asked of it."""

    transformer: dict[str, Any]  # as diffusers' classes take them
    autoencoder: dict[str, Any]
    text: tuple[int, int]  # tokens of the CLIPs and of T5
    size: tuple[int, int]
    steps: int
    window: tuple[int, ...]
    lora_rank: int
    images: tuple[int, ...]  # denoised at once
    group: int  # images of each of two prompts


@dataclass(frozen=True)
class Scale:
    """A model with what is asked of it. Sizes of images are in pixels, by the names "small" and
    "large"; ``prompt`` and ``thought`` are tokens with their ends."""

    name: str
    config: BagelConfig
    compute: torch.dtype
    pace: Pace
    sizes: dict[str, tuple[int, int]]
    prompt: int
    thought: int
    short: int  # tokens that are decoded in one measured call, and thoughts of the whole step
    decode_rows: tuple[int, ...]
    images: dict[str, tuple[int, ...]]  # denoised at once
    chains: dict[str, tuple[int, ...]]  # replayed at once
    window: int
    steps: int  # of denoising
    lora_rank: int  # 0: whole experts are trained
    side: int  # of the square products
    sustained: float  # seconds
    copied: int  # bytes
    moved: int  # parameters of the optimizer
    slowness: float  # of the cases, as a share of the estimates for the published model
    projected: tuple[Step, ...]
    painter: Painted

    @property
    def context(self) -> int:
        return self.prompt + self.thought

    def latent_tokens(self, size: str) -> int:
        height, width = self.sizes[size]
        return (height // self.config.latent.stride) * (width // self.config.latent.stride)


STEPS = (
    Step("8 prompts x 4 chains, small images, 1 device", 8, 4, "small", 1),
    Step("the paper's: 32 prompts x 24 chains, large images, 8 devices", 32, 24, "large", 8),
)


def _medium(heads: int = 24) -> Painted:
    """Stable Diffusion 3.5 Medium, or so many of its heads; trained as in
    recipes/sd35/flow_grpo_pickscore.toml."""
    return Painted(
        transformer={
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "num_attention_heads": heads,
            "attention_head_dim": 64,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 64 * heads,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        autoencoder=_autoencoder((128, 256, 512, 512), layers=2, groups=32),
        text=(77, 128),
        size=(512, 512),
        steps=10,
        window=tuple(range(9)),
        lora_rank=32,
        images=(1, 8, 24),
        group=8,
    )


def _autoencoder(widths: tuple[int, ...], layers: int, groups: int) -> dict[str, Any]:
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    }


def _miniature() -> Painted:
    small = {"num_layers": 2, "attention_head_dim": 8, "joint_attention_dim": 64}
    small |= {"pooled_projection_dim": 64, "pos_embed_max_size": 16, "sample_size": 16}
    return Painted(
        transformer={**_medium(4).transformer, **small}
        | {"caption_projection_dim": 32, "dual_attention_layers": (0,)},
        autoencoder=_autoencoder((8, 8), layers=1, groups=4),
        text=(5, 7),
        size=(32, 32),
        steps=2,
        window=(0,),
        lora_rank=2,
        images=(1, 4),
        group=2,
    )


def published() -> Scale:
    """BAGEL-7B-MoT."""
    return Scale(
        name="7b",
        config=BagelConfig.published(),
        compute=torch.bfloat16,
        pace=Pace(3, 10, 2.0),
        sizes={"small": (512, 512), "large": (1024, 1024)},
        prompt=88,
        thought=512,
        short=64,
        decode_rows=(1, 8, 32, 96),
        images={"small": (1, 8, 32), "large": (1, 4)},
        chains={"small": (1, 2, 4), "large": (1,)},
        window=3,
        steps=24,
        lora_rank=64,
        side=8192,
        sustained=6.0,
        copied=2**32,
        moved=2 * 10**9,
        slowness=1.0,
        projected=STEPS,
        painter=_medium(),
    )


def eighth() -> Scale:
    """An eighth of the width, with all layers: launches and lengths of the published model on a
    small card."""
    whole = published()
    narrow = {
        "hidden_size": 448,
        "intermediate_size": 2368,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
    }
    llm = whole.config.llm.model_copy(update=narrow)
    return Scale(
        **{
            **{name: getattr(whole, name) for name in Scale.__dataclass_fields__},
            "name": "eighth",
            "config": whole.config.model_copy(update={"llm": llm}),
            "moved": 2 * 10**8,
            "copied": 2**30,
            "lora_rank": 16,
            "slowness": 0.6,
            "painter": _medium(3),
        }
    )


def mini() -> Scale:
    """The embedded model's sizes, with more words: what runs on a CPU in seconds."""
    llm = LanguageConfig(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return Scale(
        name="mini",
        config=BagelConfig(
            llm=llm,
            latent=Latent(space="pixels", patch=4, channels=3, max_size=12, time_shift=2.0),
        ),
        compute=torch.float32,
        pace=Pace(1, 2, 0.0),
        sizes={"small": (24, 24), "large": (48, 48)},
        prompt=12,
        thought=16,
        short=8,
        decode_rows=(1, 8),
        images={"small": (8,), "large": (1,)},
        chains={"small": (2,), "large": (1,)},
        window=3,
        steps=8,
        lora_rank=0,
        side=256,
        sustained=0.2,
        copied=2**24,
        moved=10**6,
        slowness=0.03,
        projected=(Step("4 prompts x 2 chains, small images, 1 device", 4, 2, "small", 1),),
        painter=_miniature(),
    )


SCALES = {"7b": published, "eighth": eighth, "mini": mini}
