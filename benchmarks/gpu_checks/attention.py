"""Case 1: the kernels of attention, in the shapes of image blocks over a text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from unigrpo_models.bagel.accounting import Work, pair_flops
from unigrpo_models.bagel.network import attend_all, attend_causal

from gpu_checks.harness import Bench, Entry, Pace, UnavailableError
from gpu_checks.scales import Scale

ROWS = 4
BACKWARD = 2.5  # of the forward's FLOPs: scores are computed again
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As the network does where nothing is hidden."""
    return attend_all(q, k, v, None)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As the network does where texts are padded."""
    padding = torch.zeros(len(q), 1, 1, k.shape[2], device=q.device, dtype=q.dtype)
    padding[..., :8] = float("-inf")
    return attend_all(q, k, v, padding)


FORMS: dict[str, Attend] = {"gqa": grouped, "folded": folded, "repeated": repeated}


def attention(bench: Bench, scale: Scale) -> None:
    for size in scale.sizes:
        queries = scale.latent_tokens(size) + 2
        keys = scale.context + queries
        q, k, v = _inputs(bench, scale, ROWS, queries, keys)
        forward = Work(_flops(scale, ROWS * queries * keys), _bytes(q, k, v, q))
        both = Work(forward.flops * (1 + BACKWARD), 3 * forward.bytes)
        gradient = torch.randn_like(q)
        backends = BACKENDS if bench.cuda else {"default": None}
        runs = {
            f"{form} {backend}": _on(chosen, attend)
            for backend, chosen in backends.items()
            for form, attend in FORMS.items()
        }
        runs["folded, padded"] = masked
        shape = f"{queries} x {keys}"
        for name, attend in runs.items():
            bench.race(
                Entry(f"{shape} forward, {name}", _plain(attend, q, k, v), forward),
                Entry(f"{shape} both ways, {name}", _twice(attend, q, k, v, gradient), both),
                pace=_brief(bench.pace),
            )


def layer(bench: Bench, scale: Scale) -> None:
    """Attention of one layer's replay of one chain: what is visible counts, whoever computes it."""
    if bench.cuda:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    for size in scale.sizes:
        text, block = scale.context, scale.latent_tokens(size) + 2
        total = text + scale.window * block
        q, k, v = _inputs(bench, scale, 1, total, total)
        owner = torch.arange(total, device=bench.device).sub(text).div(block, rounding_mode="floor")
        owner = owner.clamp(min=-1)  # the block of each position, -1 in the text
        pairs = text * (text + 1) / 2 + scale.window * block * (text + block)
        work = Work(_flops(scale, pairs), _bytes(q, k, v, q))

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor, owner: Tensor = owner) -> Tensor:
            return torch.where(owner[j] < 0, (owner[i] >= 0) | (j <= i), owner[i] == owner[j])

        places = torch.arange(total, device=bench.device)
        seen = visible(places, places, places[:, None], places[None])
        entries = [
            Entry("split", partial(split, q, k, v, text, block), work),
            Entry("dense mask", partial(_dense, q, k, v, seen), work),
        ]
        if bench.cuda:
            mask = create_block_mask(visible, None, None, total, total, device=bench.device)
            flex = torch.compile(flex_attention, dynamic=False)
            entries.append(
                Entry(
                    "FlexAttention", partial(flex, q, k, v, block_mask=mask, enable_gqa=True), work
                )
            )
        named = [Entry(f"{size}: {e.config}, one layer", e.run, e.work) for e in entries]
        bench.race(*named, pace=_brief(bench.pace))


def split(q: Tensor, k: Tensor, v: Tensor, text: int, block: int) -> Tensor:
    """As the network does: causal text, then every block over the text and itself."""
    first = attend_causal(q[:, :, :text], k[:, :, :text], v[:, :, :text])
    count = (q.shape[2] - text) // block
    own = [x[:, :, text:].unflatten(2, (count, block))[0].transpose(0, 1) for x in (q, k, v)]
    shared = (x[:, :, :text].expand(count, -1, -1, -1) for x in (k, v))
    k, v = (torch.cat(both, 2) for both in zip(shared, own[1:], strict=True))
    rest = attend_all(own[0], k, v, None)
    return torch.cat((first, rest.transpose(0, 1).flatten(1, 2)[None]), 2)


def _dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """With keys repeated: no fast kernel takes both a mask and shared key heads."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, seen)


def _inputs(bench: Bench, scale: Scale, rows: int, queries: int, keys: int) -> list[Tensor]:
    llm = scale.config.llm
    shapes = [(llm.num_attention_heads, queries)] + [(llm.num_key_value_heads, keys)] * 2
    return [
        torch.randn(rows, heads, length, llm.head_dim, device=bench.device, dtype=scale.compute)
        for heads, length in shapes
    ]


def _flops(scale: Scale, pairs: float) -> float:
    return pair_flops(scale.config) / scale.config.llm.num_hidden_layers * pairs


def _bytes(*tensors: Tensor) -> float:
    return float(sum(x.numel() * x.element_size() for x in tensors))


def _on(backend: SDPBackend | None, attend: Attend) -> Attend:
    """Attention by one kernel; it is an error of torch's if that cannot do it."""
    if backend is None:
        return attend

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        try:
            with sdpa_kernel(backend):
                return attend(q, k, v)
        except RuntimeError as error:
            if "No available kernel" in str(error):
                raise UnavailableError("this kernel does not take these inputs") from error
            raise

    return run


def _plain(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return attend(q, k, v)

    return run


def _twice(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor
) -> Callable[[], object]:
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(attend(*inputs), inputs, gradient)


def _brief(pace: Pace) -> Pace:
    return Pace(pace.warm, pace.least, pace.seconds / 8)
