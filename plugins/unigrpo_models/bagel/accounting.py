"""What BAGEL's passes cost: floating-point operations, bytes moved and bytes held. No torch.

A multiply-add is 2 FLOP; norms, rotations, softmax and other elementwise work are not counted.
Attention is counted on the pairs (query, key) that see each other; ``rectangles`` counts all pairs
of a causal pass instead, as ``torch.utils.flop_counter`` does. Bytes are the least that must move:
every weight that a call uses is read once, the cache of the text is read (and what is new written)
once; activations are left out. The counts follow the network in what it leaves out: a last layer
of which only keys and values matter has no query, output or MLP.

A = attention heads x their width (D for the published model), B = key/value heads x their width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from unigrpo_core.workload import Work
from unigrpo_models.bagel.config import BagelConfig, LanguageConfig

TIME_WIDTH = 256  # numbers of the sinusoid that the time embedder reads
BOUNDARY = 2  # tokens around the latents of an image
OPTIMIZER_BYTES = 34
"""Bytes that a step of AdamW moves per trained parameter: the float32 weight and two moments read
and written (24), the gradient read by the clipping norm and by the step (8), and a bfloat16 copy of
the weight written (2)."""

LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Checkpointing = Literal["none", "selective", "full"]


# --- sizes ------------------------------------------------------------------------------------


def _attention_widths(llm: LanguageConfig) -> tuple[int, int]:
    """A and B."""
    return llm.num_attention_heads * llm.head_dim, llm.num_key_value_heads * llm.head_dim


@dataclass(frozen=True)
class _Layer:
    """Multiply-adds per token of one expert's matrices in a layer, which is their weights' number,
    and the other parameters beside each."""

    kv: int
    q: int
    rest: int  # o, gate, up, down
    kv_small: int  # biases, the norm of k and the norm before
    q_small: int
    rest_small: int

    @classmethod
    def of(cls, llm: LanguageConfig) -> _Layer:
        width, (a, b) = llm.hidden_size, _attention_widths(llm)
        return cls(
            kv=2 * width * b,
            q=width * a,
            rest=a * width + 3 * width * llm.intermediate_size,
            kv_small=2 * b + llm.head_dim + width,
            q_small=a + llm.head_dim,
            rest_small=width,
        )

    @property
    def macs(self) -> int:
        return self.kv + self.q + self.rest

    @property
    def parameters(self) -> int:
        return self.macs + self.kv_small + self.q_small + self.rest_small

    @property
    def skipped(self) -> int:
        """Parameters that a last layer with keys and values only does not read."""
        return self.q + self.rest + self.q_small + self.rest_small


def parameters(config: BagelConfig) -> Mapping[str, int]:
    """How many parameters each part has: "text" (the understanding expert's layers and final norm),
    "embedding", "head", "image" (the generation expert's layers and final norm, the time embedder
    and both latent projections), "tables" (fixed, never trained), "vision" (the image encoder with
    its connector; 0 where the model has none)."""
    llm, latent, eye = config.llm, config.latent, getattr(config, "vit", None)
    width, token = llm.hidden_size, latent.token_width
    expert = llm.num_hidden_layers * _Layer.of(llm).parameters + width
    return {
        "text": expert,
        "embedding": llm.vocab_size * width,
        "head": llm.vocab_size * width,
        "image": expert + _image_ends(width, token),
        "tables": latent.max_size**2 * width + (0 if eye is None else eye.side**2 * width),
        "vision": 0 if eye is None else _eye(eye, width),
    }


def _eye(vit: Any, width: int) -> int:
    """Parameters of the image encoder and the connector behind it."""
    v, inner = vit.hidden_size, vit.intermediate_size
    layer = 4 * (v * v + v) + 4 * v + 2 * inner * v + inner + v
    patches = 3 * vit.patch_size**2 * v + v + vit.side**2 * v
    connector = v * width + width + width * width + width
    return int(patches + vit.layers * layer + 2 * v + connector)


def _image_ends(width: int, token: int) -> int:
    """Parameters of the time embedder, vae2llm and llm2vae."""
    time = TIME_WIDTH * width + width + width * width + width
    return time + token * width + width + width * token + token


def owned(config: BagelConfig, expert: str) -> int:
    """The parameters that training an expert, "text" or "image", trains."""
    counts = parameters(config)
    if expert == "text":
        return counts["text"] + counts["embedding"] + counts["head"]
    return counts["image"]


def adapter_parameters(
    config: BagelConfig, rank: int, modules: Collection[str] = LORA_MODULES
) -> int:
    """The parameters of low-rank adapters of one expert: rank x (in + out) for each matrix of its
    layers. Adapters on others, the few at its ends, weigh next to nothing and are left out."""
    llm = config.llm
    width, inner, (a, b) = llm.hidden_size, llm.intermediate_size, _attention_widths(llm)
    sides = {
        "q_proj": width + a,
        "k_proj": width + b,
        "v_proj": width + b,
        "o_proj": a + width,
        "gate_proj": width + inner,
        "up_proj": width + inner,
        "down_proj": inner + width,
    }
    return llm.num_hidden_layers * rank * sum(sides.get(name, 0) for name in set(modules))


def trained_parameters(
    config: BagelConfig,
    train: Collection[str],
    lora: Collection[str] = (),
    *,
    rank: int = 0,
    modules: Mapping[str, Collection[str]] | None = None,
) -> int:
    """The parameters that an optimizer moves: all of an expert's, or those of its adapters."""
    named = modules or {}
    return sum(
        adapter_parameters(config, rank, named.get(expert, LORA_MODULES))
        if expert in lora
        else owned(config, expert)
        for expert in set(train)
    )


def cache_bytes(config: BagelConfig, rows: int, tokens: int, itemsize: int = 2) -> int:
    """Bytes of the keys and values of ``rows`` texts of ``tokens`` tokens."""
    _, b = _attention_widths(config.llm)
    return 2 * config.llm.num_hidden_layers * b * rows * tokens * itemsize


def activation_bytes(
    config: BagelConfig, tokens: int, itemsize: int = 2, mode: Checkpointing = "none"
) -> int:
    """Bytes that a forward pass keeps of the layers for its backward pass, for ``tokens`` tokens
    of either expert: with "none" all that autograd saves; with "selective" the layers' inputs, and
    the outputs of matrix products and attention; with "full" the inputs; in these two also all of
    the one layer that is being computed again. Weights that autocast has cast are not in it.

    Of adapters on all matrices about as much is kept. With an ``itemsize`` of 4 all is float32;
    with 2 what autocast computes in bfloat16 is, while the sum that runs through the layers and the
    inputs of norms stay float32.
    """
    llm = config.llm
    width, inner, (a, b) = llm.hidden_size, llm.intermediate_size, _attention_widths(llm)
    heads, groups = llm.num_attention_heads, llm.num_key_value_heads
    scales = 4 * (2 + 2 * heads + groups)  # of the norms, and attention's log-sum-exp
    if itemsize == 4:
        layer = 4 * (4 * width + 3 * a + 3 * b + 4 * inner) + scales
    else:
        layer = 20 * width + 10 * a + 10 * b + 8 * inner + scales
    if mode == "none":
        return llm.num_hidden_layers * layer * tokens
    products = itemsize * (2 * width + 2 * a + 2 * b + 2 * inner) if mode == "selective" else 0
    return (llm.num_hidden_layers * (4 * width + products) + layer) * tokens


# --- passes -----------------------------------------------------------------------------------


def pair_flops(config: BagelConfig) -> int:
    """FLOP of all layers' attention per (query, key)."""
    a, _ = _attention_widths(config.llm)
    return 4 * a * config.llm.num_hidden_layers


def _causal_pairs(tokens: int, rectangles: bool) -> float:
    return tokens**2 if rectangles else tokens * (tokens + 1) / 2


def prefill(
    config: BagelConfig,
    rows: int,
    tokens: int,
    *,
    head: bool = False,
    itemsize: int = 2,
    rectangles: bool = False,
) -> Work:
    """A causal pass over ``rows`` texts of ``tokens`` tokens. Without ``head`` only the cache is
    wanted; with it also the logits after the last token of each row."""
    llm, layer, counts = config.llm, _Layer.of(config.llm), parameters(config)
    layers = llm.num_hidden_layers
    attended = layers if head else layers - 1
    macs = rows * tokens * (layers * layer.kv + attended * (layer.q + layer.rest))
    pairs = rows * _causal_pairs(tokens, rectangles) * attended / layers
    flops = 2 * macs + pairs * pair_flops(config)
    weights = counts["text"] if head else counts["text"] - layer.skipped - llm.hidden_size
    read = weights + rows * tokens * llm.hidden_size
    if head:
        flops += 2 * rows * counts["head"]
        read += counts["head"]
    return Work(flops, read * itemsize + cache_bytes(config, rows, tokens, itemsize))


def decode_step(config: BagelConfig, rows: int, cache: float, *, itemsize: int = 2) -> Work:
    """One token for each of ``rows`` texts, the logits included; ``cache`` keys are visible, the
    token's own among them."""
    llm, layer, counts = config.llm, _Layer.of(config.llm), parameters(config)
    macs = llm.num_hidden_layers * layer.macs + counts["head"]
    flops = rows * (2 * macs + cache * pair_flops(config))
    read = counts["text"] + counts["head"] + rows * llm.hidden_size
    return Work(flops, read * itemsize + rows * cache * cache_bytes(config, 1, 1, itemsize))


def velocity(
    config: BagelConfig,
    images: int,
    latent_tokens: int,
    context: float,
    *,
    contexts: int | None = None,
    itemsize: int = 2,
) -> Work:
    """One call of the network for ``images`` images of ``latent_tokens`` tokens and the two around
    them, over ``context`` tokens of text; ``contexts`` are the different texts (default: one an
    image), whose caches are read once each."""
    llm, layer, counts = config.llm, _Layer.of(config.llm), parameters(config)
    texts = images if contexts is None else contexts
    flops = images * sum(_image_flops(config, latent_tokens, context))
    read = counts["text"] - layer.skipped - llm.hidden_size + counts["image"]
    read += (BOUNDARY + latent_tokens) * llm.hidden_size  # rows of the embedding and the table
    return Work(flops, read * itemsize + texts * context * cache_bytes(config, 1, 1, itemsize))


def _image_flops(config: BagelConfig, latents: int, context: float) -> tuple[float, float, float]:
    """FLOP of one image: the understanding expert's, the generation expert's, attention."""
    llm, layer = config.llm, _Layer.of(config.llm)
    layers, tokens = llm.num_hidden_layers, BOUNDARY + latents
    und = 2 * BOUNDARY * (layers * layer.macs - layer.q - layer.rest)
    time, project = _image_end_macs(config)
    gen = 2 * latents * (layers * layer.macs + 2 * project) + 2 * time
    queries = tokens - BOUNDARY / layers  # in the last layer those of the latents only
    return und, gen, queries * (context + tokens) * pair_flops(config)


def _image_end_macs(config: BagelConfig) -> tuple[int, int]:
    """Multiply-adds of the time embedder per image, and of one latent projection per token."""
    width = config.llm.hidden_size
    return TIME_WIDTH * width + width * width, config.latent.token_width * width


def replay(
    config: BagelConfig,
    rows: int,
    tokens: int,
    points: int,
    latent_tokens: int,
    *,
    scored: int = 0,
    train: Collection[str] = frozenset(),
    lora: Collection[str] = frozenset(),
    recompute: bool = False,
    context_gradient: bool = True,
    attention_backward: float = 2.5,
    itemsize: int = 2,
    rectangles: bool = False,
) -> Work:
    """The trainer's pass over ``rows`` texts of ``tokens`` tokens with ``points`` images each.

    Args:
        scored: positions, over all rows, whose logits are taken.
        train: the experts that get a gradient; none: a forward pass.
        lora: those of them that get it through adapters, whose own FLOPs are not counted: a frozen
            matrix costs its gradient to the input only, once its forward.
        recompute: the layers run forward once more (full checkpointing).
        context_gradient: the images' loss reaches the text that they see.
        attention_backward: times the forward; 2.5 where the kernel computes the scores again.
    """
    llm, layer, counts = config.llm, _Layer.of(config.llm), parameters(config)
    layers, pair = llm.num_hidden_layers, pair_flops(config)
    states = scored > 0
    text_flops = 2 * rows * tokens * (layers * layer.macs)
    text_pairs = rows * _causal_pairs(tokens, rectangles)
    if not states:
        text_flops -= 2 * rows * tokens * (layer.q + layer.rest)
        text_pairs *= (layers - 1) / layers
    head = 2 * scored * counts["head"]
    und, gen, seen = (rows * points * part for part in _image_flops(config, latent_tokens, tokens))
    body = text_flops + text_pairs * pair + und + gen + seen
    flops = body + head
    weights = counts["text"] + counts["image"] * (points > 0) + counts["head"] * states
    passes = 1
    if train:
        passes += 1 + recompute
        text, image = "text" in train, "image" in train
        through = 1 if "text" in lora else 2
        if text and (states or (context_gradient and points > 0)):
            flops += through * (text_flops + head) + attention_backward * text_pairs * pair
        if points and (image or (text and context_gradient)):
            images, ends = rows * points, _image_end_macs(config)
            if text and context_gradient:
                flops += through * und
            else:  # nothing flows to the first layer's inputs
                flops += und - 2 * images * BOUNDARY * (layer.kv + (layer.q if layers > 1 else 0))
            if image and "image" not in lora:
                time = TIME_WIDTH * llm.hidden_size  # its input, like the latents, has no gradient
                flops += 2 * gen - 2 * images * (latent_tokens * ends[1] + time)
            else:
                flops += gen - 2 * images * (latent_tokens * ends[1] + ends[0])
            flops += attention_backward * seen
        if recompute:
            flops += body
    moved = passes * weights * itemsize + cache_bytes(config, rows, tokens, itemsize) * passes
    return Work(flops, moved)


def optimizer(
    config: BagelConfig,
    train: Collection[str],
    lora: Collection[str] = (),
    *,
    rank: int = 0,
    modules: Mapping[str, Collection[str]] | None = None,
) -> Work:
    """A step of AdamW with the clipping norm. Its arithmetic, some 20 FLOP a parameter, never
    matters and is not counted."""
    trained = trained_parameters(config, train, lora, rank=rank, modules=modules)
    return Work(0.0, OPTIMIZER_BYTES * trained)
