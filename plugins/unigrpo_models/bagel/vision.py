"""BAGEL's eye: a SigLIP transformer over patches of an image, and the way into the language model.

Module names are those of the published checkpoint. Shapes: R images of N = h * w patches of p x p
pixels, p * p * 3 numbers each in the order (row in patch, column, channel); v is the ViT's hidden
size, D the language model's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unigrpo_models.bagel.config import VitConfig


class Embeddings(nn.Module):
    """A patch's projection, and a learned vector for its place in a grid of the largest size."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(config.side**2, config.hidden_size)

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        y: Tensor = self.patch_embedding(patches) + self.position_embedding(places)
        return y


class SelfAttention(nn.Module):
    """Every patch of an image sees all of them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen = F.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.out_proj(seen.transpose(1, 2).flatten(2))
        return y


class TwoLayers(nn.Module):
    """Two linear layers around a GELU in its tanh form."""

    def __init__(self, width: int, between: int, outside: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, between), nn.Linear(between, outside)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return y


class VisionLayer(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(width, eps=eps) for _ in range(2))
        self.self_attn = SelfAttention(width, config.num_attention_heads)
        self.mlp = TwoLayers(width, config.intermediate_size, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        y: Tensor = x + self.mlp(self.layer_norm2(x))
        return y


class Encoder(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.layers))


class VisionModel(nn.Module):
    """``vit_model.vision_model``: features [R, N, v] of patches [R, N, 3 p p] at places [N]."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        x = self.embeddings(patches, places)
        for layer in self.encoder.layers:
            x = layer(x)
        y: Tensor = self.post_layernorm(x)
        return y


class Vit(nn.Module):
    """``vit_model``."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.vision_model = VisionModel(config)


class Connector(TwoLayers):
    """``connector``: features to the language model's width."""

    def __init__(self, config: VitConfig, width: int) -> None:
        super().__init__(config.hidden_size, width, width)


def grid_places(height: int, width: int, side: int, device: torch.device) -> Tensor:
    """int64 [h * w]: the rows of a table for a grid of ``side`` x ``side`` that a smaller grid, at
    its upper left, takes row by row."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return (rows[:, None] * side + columns).flatten()
