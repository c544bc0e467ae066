"""What a velocity of an image transformer costs, by the names and shapes of its weights. No torch.

A matrix of n weights costs 2 n FLOP for every token that passes it, a convolution for every place;
norms, rotations, softmax and other elementwise work are not counted, nor is what adapters multiply.
A kind of transformer says by regular expressions, searched for in the names, which weights see the
tokens of the text, those of both, or one vector an image; all others see the image's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
Config = Mapping[str, Any]

ATTENTION_BACKWARD = 2.5
"""Times the forward, where the kernel computes the scores again."""


@dataclass(frozen=True)
class Tokens:
    """Of one image: its own, and those of the text that is read with it."""

    image: int
    text: int

    @property
    def all(self) -> int:
        return self.image + self.text


@dataclass(frozen=True)
class Transformer:
    """A kind of transformer.

    Args:
        name: its class in diffusers.
        targets: the layers that customarily get adapters, by the end of their path.
        once, text, both: what sees one vector, the text, or text and image.
        data: what reads data, so that no gradient goes on to its input.
        early: in the blocks, what reads nothing that adapters have changed.
        attention: FLOPs of all layers' attention for one image.
        patch: latents of a token's side; None: as the transformer's configuration says.
        clip: whether it also reads CLIP's tokens.
    """

    name: str
    targets: tuple[str, ...]
    once: str
    text: str
    both: str | None
    data: str
    early: str
    attention: Callable[[Config, Tokens], float]
    patch: int | None = None
    clip: bool = False

    def tokens(self, name: str, each: Tokens) -> int:
        """How many tokens pass a weight."""
        if re.search(self.once, name):
            return 1
        if re.search(self.text, name):
            return each.text
        return each.all if self.both and re.search(self.both, name) else each.image

    def forward(self, shapes: Shapes, config: Config, each: Tokens) -> float:
        """FLOPs of one velocity of one image."""
        multiplied = sum(self._product(*weight, each) for weight in products(shapes))
        return multiplied + self.attention(config, each)

    def training(
        self,
        shapes: Shapes,
        config: Config,
        each: Tokens,
        *,
        adapted: bool = False,
        recompute: bool = False,
        attention_backward: float = ATTENTION_BACKWARD,
    ) -> float:
        """FLOPs of one velocity and its backward pass.

        Args:
            adapted: adapters are trained, so a frozen matrix costs its input's gradient only.
            recompute: the blocks run forward once more (full checkpointing).
            attention_backward: times the forward.
        """
        found = self.attention(config, each) * (1 + attention_backward + recompute)
        for name, shape in products(shapes):
            again = recompute and "blocks." in name
            passes = 1 + again + (self._adapted(name) if adapted else self._whole(name))
            found += passes * self._product(name, shape, each)
        return found

    def _whole(self, name: str) -> int:
        """Products of a backward pass: the gradient of the weight, and that of its input."""
        return 1 if re.search(self.data, name) else 2

    def _adapted(self, name: str) -> int:
        after = "blocks." in name or name.startswith("proj_out")
        return int(after and not re.search(f"{self.once}|{self.early}", name))

    def _product(self, name: str, shape: tuple[int, ...], each: Tokens) -> float:
        return 2.0 * self.tokens(name, each) * prod(shape)


def products(shapes: Shapes) -> list[tuple[str, tuple[int, ...]]]:
    """The weights that are multiplied with: of linear layers and convolutions."""
    return [
        (name, shape)
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) in (2, 4)
    ]


# --- kinds ------------------------------------------------------------------------------------


def width_of(config: Config) -> int:
    """Numbers of a token."""
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def _sd3(config: Config, each: Tokens) -> float:
    dual = len(config.get("dual_attention_layers") or ())
    pairs = config["num_layers"] * each.all**2 + dual * each.image**2
    return float(4 * width_of(config) * pairs)


def _flux(config: Config, each: Tokens) -> float:
    layers = config["num_layers"] + config["num_single_layers"]
    return float(4 * width_of(config) * layers * each.all**2)


def _sana(config: Config, each: Tokens) -> float:
    """Linear in the image's tokens; a row of ones beside the values gives the sums."""
    linear = 4.0 * width_of(config) * (config["attention_head_dim"] + 1) * each.image
    cross = config["num_cross_attention_heads"] * config["cross_attention_head_dim"]
    return float(config["num_layers"] * (linear + 4.0 * cross * each.image * each.text))


JOINT = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)

SD3 = Transformer(
    name="SD3Transformer2DModel",
    targets=JOINT,  # Flow-GRPO's
    once=r"time_text_embed|\.norm\w*\.linear|norm_out",
    text=r"context_embedder|\.add_|to_add_out|ff_context",
    both=None,
    data=r"pos_embed|context_embedder|linear_1\.",
    early=r"^transformer_blocks\.0\.attn(\.(to|add)_[qkv]\b|2)",
    attention=_sd3,
    clip=True,
)
FLUX = Transformer(
    name="FluxTransformer2DModel",
    targets=(  # Flow-GRPO's
        *JOINT,
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    ),
    once=r"time_text_embed|\.norm\w*\.linear|norm_out",
    text=r"context_embedder|\.add_|to_add_out|ff_context",
    both=r"^single_transformer_blocks",
    data=r"x_embedder|context_embedder|linear_1\.",
    early=r"^transformer_blocks\.0\.attn\.(to|add)_[qkv]\b",
    attention=_flux,
    patch=2,
)
SANA = Transformer(
    name="SanaTransformer2DModel",
    targets=("to_q", "to_k", "to_v"),  # those of diffusers' own training script
    once=r"^time_embed",
    text=r"caption_projection|attn2\.to_[kv]",
    both=None,
    data=r"patch_embed|linear_1\.",
    early=r"attn2\.to_[kv]|^transformer_blocks\.0\.attn1\.to_[qkv]",
    attention=_sana,
)
