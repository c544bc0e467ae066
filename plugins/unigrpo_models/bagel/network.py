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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from unigrpo_core.plugin import Checkpointing
from unigrpo_models.bagel.config import BagelConfig, LanguageConfig
from unigrpo_models.bagel.latents import patches
from unigrpo_models.bagel.vision import Connector, Vit, grid_places
from unigrpo_models.norm import RMSNorm
from unigrpo_models.recompute import recomputed

LayerCache = tuple[Tensor, Tensor]

UND = ""
GEN = "_moe_gen"


@dataclass(frozen=True, eq=False)
class Before:
    """What stands before text: per layer its keys and values [R, Hk, L, d]."""

    caches: list[LayerCache]
    positions: Tensor  # int64 [R], of what comes next
    hidden: Tensor  # bool [R, L], the slots that hold nothing


@dataclass(frozen=True)
class Rotary:
    """cos and sin [R, 1, L, d] (or [R, 1, 1, d]) of the positions of a stream; the first half of
    sin is negated, so that the half-split rotation is x * cos + roll(x, d / 2) * sin."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """In x's type, whatever the stream's: a cache has one type."""
        turned = torch.addcmul(x * self.cos, x.roll(x.shape[-1] // 2, -1), self.sin)
        return turned.to(x.dtype)


def rotary(positions: Tensor, config: LanguageConfig, dtype: torch.dtype) -> Rotary:
    """The half-split rotation for integer positions [R, L]; angles in float32."""
    half = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * config.rope_theta ** (-half / config.head_dim)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return Rotary(torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype))


def linear(module: nn.Module, x: Tensor, frozen: bool) -> Tensor:
    """A linear layer, with adapters or without; frozen: no gradient to its weights, but through it
    to x."""
    y: Tensor
    if not frozen:
        y = module(x)
    elif isinstance(module, nn.Linear):
        bias = None if module.bias is None else module.bias.detach()
        y = F.linear(x, module.weight.detach(), bias)
    else:
        fixed = {name: parameter.detach() for name, parameter in module.named_parameters()}
        y = functional_call(module, fixed, (x,))
    return y


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

    def query(self, x: Tensor, expert: str, frozen: bool = False) -> Tensor:
        """q [R, H, L, d] of x [R, L, D], normed and not rotated."""
        q: Tensor = part(self, f"q_norm{expert}")(
            self._heads(x, f"q_proj{expert}", frozen), frozen=frozen
        )
        return q

    def entry(self, x: Tensor, expert: str, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """k and v [R, Hk, L, d] of x [R, L, D], k normed and not rotated."""
        k = part(self, f"k_norm{expert}")(self._heads(x, f"k_proj{expert}", frozen), frozen=frozen)
        return k, self._heads(x, f"v_proj{expert}", frozen)

    def _heads(self, x: Tensor, name: str, frozen: bool) -> Tensor:
        y = linear(part(self, name), x, frozen)
        return y.view(*x.shape[:2], -1, self.config.head_dim).transpose(1, 2)

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
    [R, 1, 1 or Lq, Lk], or None). The query heads that share a key head are folded into the query
    length, so keys are never repeated."""
    rows, heads, length, d = q.shape
    if padding is not None and padding.shape[2] > 1:
        padding = padding.repeat(1, 1, heads // k.shape[1], 1)
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
    """One pre-norm layer, with each expert's own weights throughout. It is called with the pass to
    run, ``layer(Layer.text, ...)``, so that whatever wraps or compiles a module sees every pass."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        for expert in (UND, GEN):
            self.add_module(f"mlp{expert}", MLP(config))
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self.add_module(norm + expert, RMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **kwargs)

    def normed(self, x: Tensor, expert: str, frozen: bool = False) -> Tensor:
        """What attention reads."""
        y: Tensor = part(self, f"input_layernorm{expert}")(x, frozen=frozen)
        return y

    def finish(self, x: Tensor, attended: Tensor, expert: str, frozen: bool = False) -> Tensor:
        x = x + self.self_attn.output(attended, expert, frozen)
        normed: Tensor = part(self, f"post_attention_layernorm{expert}")(x, frozen=frozen)
        y: Tensor = part(self, f"mlp{expert}")(normed, frozen=frozen)
        return x + y

    def text(
        self,
        x: Tensor,
        rope: Rotary,
        before: LayerCache | None = None,
        mask: Tensor | None = None,
        *,
        want_x: bool = True,
    ) -> tuple[Tensor, LayerCache]:
        """A text stream [R, L, D], from an empty context or, with an additive mask
        [R, 1, L, Lb + L], over the cache of what stands before. Returns it with the cache of both;
        without ``want_x`` as it is, for a last layer of which only the cache matters."""
        normed, attention = self.normed(x, UND), self.self_attn
        k, v = attention.entry(normed, UND)
        k = rope(k)
        if before is not None:
            k, v = (torch.cat(both, 2) for both in zip(before, (k, v), strict=True))
        if want_x:
            q = rope(attention.query(normed, UND))
            seen = attend_causal(q, k, v) if mask is None else attend_all(q, k, v, mask)
            x = self.finish(x, seen, UND)
        return x, (k, v)

    def step(
        self,
        x: Tensor,
        rope: Rotary,
        cache: LayerCache,
        places: tuple[Tensor, Tensor],
        padding: Tensor,
    ) -> Tensor:
        """One token per row [R, 1, D]; its key and value are written into the cache, in place, at
        the ``places`` (row, slot), and as many slots are seen as ``padding`` has."""
        normed, attention = self.normed(x, UND), self.self_attn
        k, v = attention.entry(normed, UND)
        rows, slots = places
        cache[0][rows, :, slots] = rope(k)[:, :, 0]
        cache[1][rows, :, slots] = v[:, :, 0]
        keys, values = (kept[:, :, : padding.shape[-1]] for kept in cache)
        q = rope(attention.query(normed, UND))
        return self.finish(x, attend_all(q, keys, values, padding), UND)

    def image(
        self,
        boundary: Tensor,
        latents: Tensor,
        cache: LayerCache,
        owner: Tensor | None,
        padding: Tensor | None,
        *,
        frozen: bool,
        last: bool,
    ) -> tuple[Tensor, Tensor]:
        """Image blocks: boundary tokens [R, 2, D] (UND) and latents [R, N, D] (GEN) over themselves
        and row ``owner`` [R] of a text cache (None: each its own row). ``frozen`` cuts the gradient
        to UND's weights; in the ``last`` layer the boundary tokens are only read from."""
        attention = self.self_attn
        edge, inner = self.normed(boundary, UND, frozen), self.normed(latents, GEN)
        k, v = (
            torch.cat((kept if owner is None else kept[owner], *own), 2)
            for kept, *own in zip(
                cache, attention.entry(edge, UND, frozen), attention.entry(inner, GEN), strict=True
            )
        )
        q = attention.query(inner, GEN)
        if last:
            return boundary, self.finish(latents, attend_all(q, k, v, padding), GEN)
        q = torch.cat((attention.query(edge, UND, frozen), q), 2)
        attended = attend_all(q, k, v, padding)
        boundary = self.finish(boundary, attended[:, :, :2], UND, frozen)
        return boundary, self.finish(latents, attended[:, :, 2:], GEN)


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
        first: Any = self.mlp[0]  # a linear layer, or one with an adapter
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
        if config.vit is not None:
            self.vit_model = Vit(config.vit).requires_grad_(False)
            self.connector = Connector(config.vit, width).requires_grad_(False)
            self.vit_pos_embed = PositionTable(config.vit.side, width)
        self.checkpointing: Checkpointing = "none"

    def published(self) -> dict[str, Tensor]:
        """The weights under their published names, adapters left out."""
        state = self.state_dict().items()
        return {name.replace(".base_layer", ""): x for name, x in state if ".lora_" not in name}

    def _run(self, layer: Layer, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A pass of a layer, recomputed in the backward as ``checkpointing`` says."""
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return layer(run, *args, **kwargs)
        return recomputed(self.checkpointing, layer, run, *args, **kwargs)

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
        return grid_places(height, width, self.config.latent.max_size, device)

    def embed_latents(self, x_t: Tensor, t: Tensor, table_rows: Tensor) -> Tensor:
        """[R, N, D] of latent tokens [R, N, token] at times t [R] and places [N]."""
        table = self.latent_pos_embed.pos_embed[table_rows]
        projected = self.vae2llm(x_t.to(self.vae2llm.weight.dtype))
        latents: Tensor = projected + self.time_embedder(t)[:, None] + table
        return latents

    def embed_image(self, pixels: Tensor) -> Tensor:
        """[R, N, D] of what the ViT sees of images [R, 3, h p, w p] in [-1, 1], row by row."""
        vit = self.config.vit
        assert vit is not None
        seen = patches(vit.patch_size, pixels)
        places = grid_places(seen.shape[1], seen.shape[2], vit.side, pixels.device)
        features = self.vit_model.vision_model(seen.flatten(1, 2), places)
        embedded: Tensor = self.connector(features) + self.vit_pos_embed.pos_embed[places]
        return embedded

    def text(
        self, ids: Tensor, before: Before | None = None, *, want_hidden: bool = True
    ) -> tuple[Tensor | None, list[LayerCache]]:
        """Final hidden states [R, L, D] (None if not wanted) and cache of right-padded ids [R, L],
        from an empty context or after other text, whose slots come first in the cache."""
        x = self.embed(ids)
        places = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        mask = None
        if before is not None:
            places = places + before.positions[:, None]
            future = torch.full((ids.shape[1],) * 2, float("-inf"), device=ids.device).triu(1)
            past = torch.zeros(before.hidden.shape, device=ids.device)
            past = past.masked_fill(before.hidden, float("-inf"))[:, None]
            size = (len(ids), ids.shape[1], -1)
            mask = torch.cat((past.expand(size), future.expand(size)), 2)[:, None]
        rope = rotary(places, self.config.llm, x.dtype)
        caches = []
        for number, layer in enumerate(self.layers):
            wanted = want_hidden or number + 1 < len(self.layers)
            kept = None if before is None else before.caches[number]
            x, cache = self._run(layer, Layer.text, x, rope, kept, mask, want_x=wanted)
            caches.append(cache)
        return (self.transformer.norm(x) if want_hidden else None), caches

    def step(
        self,
        ids: Tensor,
        positions: Tensor,
        caches: list[LayerCache],
        padding: Tensor,
        places: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [R, D] of one token per row, ids and positions [R]. Its keys and
        values are written into the caches, in place, at slots ``places`` [R] (None: slot =
        position); ``padding`` is additive [R, 1, 1, L] and hides the slots beyond."""
        places = positions if places is None else places
        x = self.embed(ids[:, None])
        rope = rotary(positions[:, None], self.config.llm, x.dtype)
        rows = torch.arange(len(ids), device=ids.device)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(Layer.step, x, rope, cache, (rows, places), padding)
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
        owner: Tensor | None = None,
        *,
        frozen: bool = False,
    ) -> Tensor:
        """v = noise - data, float32 [R, N, token], for x_t [R, N, token] and t [R], each over row
        ``owner`` [R] of the text caches (None: over its own row), whose blocks stand at
        ``position`` [C]. ``frozen`` cuts the gradient to UND's weights and embeddings."""
        latents = self.embed_latents(x_t, t, table_rows)
        boundary = self.embed(boundary_ids)
        if frozen:
            boundary = boundary.detach()
        latents = latents.to(boundary.dtype)
        boundary = boundary.expand(len(x_t), -1, -1)
        # All of a block stands at one position, and attention sees only differences of positions:
        # turning the keys of the text back by it spares every query and key of the block its turn.
        rope = rotary(-position[:, None], self.config.llm, boundary.dtype)
        for layer, (k, v) in zip(self.layers, caches, strict=True):
            boundary, latents = self._run(
                layer,
                Layer.image,
                boundary,
                latents,
                (rope(k), v),
                owner,
                padding,
                frozen=frozen,
                last=layer is self.layers[-1],
            )
        velocity: Tensor = self.llm2vae(self.transformer.norm_moe_gen(latents))
        return velocity.float()
