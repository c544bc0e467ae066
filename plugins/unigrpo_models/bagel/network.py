"""BAGEL's network: a mixture of two transformers over one attention.

Module names are those of the published checkpoint. The understanding expert ("UND", plain names)
processes text and the two boundary tokens of an image block; the generation expert ("GEN", names
with ``_moe_gen``) the latent tokens. Text and latents stay two contiguous streams through all
layers; only queries, keys and values meet. Attention needs no mask beyond the padding of texts:
the text stream is causal, and an image block sees all of its text and all of itself.

Shapes: R rows, L text tokens, N latent tokens, D hidden, H query heads, Hk key/value heads,
d = D / H. A text cache is per layer a pair (k, v) [R, Hk, L, d], k after qk-norm and rotary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unigrpo_models.bagel.config import BagelConfig, LanguageConfig

LayerCache = tuple[Tensor, Tensor]

UND = ""
GEN = "_moe_gen"


@dataclass(frozen=True)
class Rotary:
    """cos and sin [R, 1, L, d] (or [R, 1, 1, d]) of the positions of a stream; the first half of
    sin is negated, so that the half-split rotation is x * cos + roll(x, d / 2) * sin."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addcmul(x * self.cos, x.roll(x.shape[-1] // 2, -1), self.sin)


def rotary(positions: Tensor, config: LanguageConfig, dtype: torch.dtype) -> Rotary:
    """The half-split rotation for integer positions [R, L]; angles in float32."""
    half = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * config.rope_theta ** (-half / config.head_dim)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return Rotary(torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype))


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, *, frozen: bool = False) -> Tensor:
        weight = self.weight.detach() if frozen else self.weight
        return F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype) * weight.to(x.dtype)


def linear(module: nn.Linear, x: Tensor, frozen: bool) -> Tensor:
    """A linear layer; frozen: no gradient to its weights, but through it to x."""
    if not frozen:
        y: Tensor = module(x)
        return y
    bias = None if module.bias is None else module.bias.detach()
    return F.linear(x, module.weight.detach(), bias)


def part(owner: nn.Module, name: str) -> Any:
    """The submodule of that name; an expert's own ends in its suffix."""
    return owner._modules[name]


class Attention(nn.Module):
    """The projections of both experts; who attends to what is the layer's business."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        width, d = config.hidden_size, config.head_dim
        q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
        for expert in (UND, GEN):
            self.add_module(f"q_proj{expert}", nn.Linear(width, q))
            self.add_module(f"k_proj{expert}", nn.Linear(width, kv))
            self.add_module(f"v_proj{expert}", nn.Linear(width, kv))
            self.add_module(f"o_proj{expert}", nn.Linear(q, width, bias=False))
            self.add_module(f"q_norm{expert}", RMSNorm(d, config.rms_norm_eps))
            self.add_module(f"k_norm{expert}", RMSNorm(d, config.rms_norm_eps))

    def project(
        self, x: Tensor, rope: Rotary, expert: str, frozen: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [R, H, L, d] and k, v [R, Hk, L, d] of x [R, L, D]."""
        rows, length, _ = x.shape

        def heads(name: str) -> Tensor:
            y = linear(part(self, f"{name}_proj{expert}"), x, frozen)
            return y.view(rows, length, -1, self.config.head_dim)

        q = part(self, f"q_norm{expert}")(heads("q"), frozen=frozen)
        k = part(self, f"k_norm{expert}")(heads("k"), frozen=frozen)
        return rope(q.transpose(1, 2)), rope(k.transpose(1, 2)), heads("v").transpose(1, 2)

    def output(self, x: Tensor, expert: str, frozen: bool) -> Tensor:
        """[R, L, D] of attended heads [R, H, L, d]."""
        merged = x.transpose(1, 2).flatten(2)
        return linear(part(self, f"o_proj{expert}"), merged, frozen)


def attend_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of a stream to itself; padding on the right is harmless."""
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )


def attend_all(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    """Attention of q [R, H, Lq, d] to all keys [R, Hk, Lk, d] but the padded ones (additive mask
    [R, 1, 1, Lk], or None). The query heads that share a key head are folded into the query length,
    so keys are never repeated."""
    rows, heads, length, d = q.shape
    folded = q.reshape(rows, k.shape[1], heads // k.shape[1] * length, d)
    return F.scaled_dot_product_attention(folded, k, v, padding).view(rows, heads, length, d)


class MLP(nn.Module):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, *, frozen: bool = False) -> Tensor:
        gate, up = linear(self.gate_proj, x, frozen), linear(self.up_proj, x, frozen)
        return linear(self.down_proj, F.silu(gate) * up, frozen)


class Layer(nn.Module):
    """One pre-norm layer, with each expert's own weights throughout."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        for expert in (UND, GEN):
            self.add_module(f"mlp{expert}", MLP(config))
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self.add_module(norm + expert, RMSNorm(config.hidden_size, config.rms_norm_eps))

    def project(
        self, x: Tensor, rope: Rotary, expert: str, frozen: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed = part(self, f"input_layernorm{expert}")(x, frozen=frozen)
        return self.self_attn.project(normed, rope, expert, frozen)

    def finish(self, x: Tensor, attended: Tensor, expert: str, frozen: bool = False) -> Tensor:
        x = x + self.self_attn.output(attended, expert, frozen)
        normed: Tensor = part(self, f"post_attention_layernorm{expert}")(x, frozen=frozen)
        y: Tensor = part(self, f"mlp{expert}")(normed, frozen=frozen)
        return x + y

    def text(self, x: Tensor, rope: Rotary) -> tuple[Tensor, LayerCache]:
        """A text stream [R, L, D] from an empty context."""
        q, k, v = self.project(x, rope, UND)
        return self.finish(x, attend_causal(q, k, v), UND), (k, v)

    def image(
        self,
        boundary: Tensor,
        latents: Tensor,
        rope: Rotary,
        cache: LayerCache,
        padding: Tensor | None,
        frozen: bool,
    ) -> tuple[Tensor, Tensor]:
        """An image block: boundary tokens [R, 2, D] (UND) and latents [R, N, D] (GEN) over the
        text cache and themselves. ``frozen`` cuts the gradient to UND's weights."""
        q_b, k_b, v_b = self.project(boundary, rope, UND, frozen)
        q_l, k_l, v_l = self.project(latents, rope, GEN)
        k = torch.cat((cache[0], k_b, k_l), 2)
        v = torch.cat((cache[1], v_b, v_l), 2)
        attended = attend_all(torch.cat((q_b, q_l), 2), k, v, padding)
        edges, inner = attended[:, :, :2], attended[:, :, 2:]
        return self.finish(boundary, edges, UND, frozen), self.finish(latents, inner, GEN)


class Transformer(nn.Module):
    """``language_model.model``."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_moe_gen = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LanguageModel(nn.Module):
    """``language_model``."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.model = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class TimeEmbedder(nn.Module):
    """Embeds t in [0, 1] as it is: 256 numbers, cosines first, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        embedded: Tensor = self.mlp(sinusoid(t).to(first.weight.dtype))
        return embedded


def sinusoid(t: Tensor) -> Tensor:
    """float32 [..., 256] of times t [...]: cos and sin of t * 10000^(-m / 128)."""
    m = torch.arange(128, device=t.device, dtype=torch.float32)
    angles = t.float()[..., None] * torch.exp(-math.log(10000) * m / 128)
    return torch.cat((angles.cos(), angles.sin()), -1)


class PositionTable(nn.Module):
    """The fixed factorised table [S * S, D]: the first half encodes the column, the second the
    row; each half is sines then cosines. Stored with the weights, never trained."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        m = torch.arange(width // 4, dtype=torch.float64)
        angles = torch.arange(side, dtype=torch.float64)[:, None] * 10000 ** (-m / (width // 4))
        line = torch.cat((angles.sin(), angles.cos()), 1)
        table = torch.cat((line.repeat(side, 1), line.repeat_interleave(side, 0)), 1)
        self.pos_embed = nn.Parameter(table.float(), requires_grad=False)


class BagelNetwork(nn.Module):
    """All weights, under the published names, and the three passes over them."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.config = config
        width, token = config.llm.hidden_size, config.latent.token_width
        self.language_model = LanguageModel(config.llm)
        self.time_embedder = TimeEmbedder(width)
        self.vae2llm = nn.Linear(token, width)
        self.llm2vae = nn.Linear(width, token)
        self.latent_pos_embed = PositionTable(config.latent.max_size, width)

    @property
    def transformer(self) -> Transformer:
        return self.language_model.model

    @property
    def layers(self) -> list[Layer]:
        return cast("list[Layer]", list(self.transformer.layers))

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.transformer.embed_tokens.weight)

    def table_rows(self, height: int, width: int) -> Tensor:
        """int64 [h * w]: the position table's rows for a grid of latent tokens, row by row."""
        device = self.latent_pos_embed.pos_embed.device
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        return (rows[:, None] * self.config.latent.max_size + columns).flatten()

    def text(self, ids: Tensor) -> tuple[Tensor, list[LayerCache]]:
        """Final hidden states [R, L, D] and cache of right-padded ids [R, L], positions from 0."""
        x = self.embed(ids)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        rope = rotary(positions, self.config.llm, x.dtype)
        caches = []
        for layer in self.layers:
            x, cache = layer.text(x, rope)
            caches.append(cache)
        hidden: Tensor = self.transformer.norm(x)
        return hidden, caches

    def step(
        self, ids: Tensor, positions: Tensor, caches: list[LayerCache], padding: Tensor
    ) -> Tensor:
        """Final hidden states [R, D] of one token per row, ids and positions [R]. Its keys and
        values are written into the caches, in place, at slot = position; ``padding`` is additive
        [R, 1, 1, L] and hides the slots beyond."""
        x = self.embed(ids[:, None])
        rope = rotary(positions[:, None], self.config.llm, x.dtype)
        rows = torch.arange(len(ids), device=ids.device)
        for layer, (keys, values) in zip(self.layers, caches, strict=True):
            q, k, v = layer.project(x, rope, UND)
            keys[rows, :, positions] = k[:, :, 0]
            values[rows, :, positions] = v[:, :, 0]
            length = padding.shape[-1]
            attended = attend_all(q, keys[:, :, :length], values[:, :, :length], padding)
            x = layer.finish(x, attended, UND)
        hidden: Tensor = self.transformer.norm(x)
        return hidden[:, 0]

    def velocity(
        self,
        x_t: Tensor,
        t: Tensor,
        table_rows: Tensor,
        boundary_ids: Tensor,
        position: Tensor,
        caches: list[LayerCache],
        padding: Tensor | None,
        *,
        frozen: bool = False,
    ) -> Tensor:
        """v = noise - data, float32 [R, N, token], for x_t [R, N, token], t [R], the block's one
        position [R] and the text caches of the rows. ``frozen`` cuts the gradient to UND's weights
        and embeddings."""
        table = self.latent_pos_embed.pos_embed[table_rows]
        latents = self.vae2llm(x_t.to(self.vae2llm.weight.dtype))
        latents = latents + self.time_embedder(t)[:, None] + table
        boundary = self.embed(boundary_ids)
        if frozen:
            boundary = boundary.detach()
        latents = latents.to(boundary.dtype)
        boundary = boundary.expand(len(x_t), -1, -1)
        rope = rotary(position[:, None], self.config.llm, boundary.dtype)
        for layer, cache in zip(self.layers, caches, strict=True):
            boundary, latents = layer.image(boundary, latents, rope, cache, padding, frozen)
        v: Tensor = self.llm2vae(self.transformer.norm_moe_gen(latents))
        return v.float()
