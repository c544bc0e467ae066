"""What the passes of a causal language model cost, by its configuration and the shapes of its
weights. No torch.

A matrix of n weights costs 2 n FLOP for every token that passes it, one of a mixture's experts for
the share of tokens that are sent to it; norms, rotations, softmax, other elementwise work, and what
adapters multiply are not counted. Attention is counted on the pairs that see each other, whatever
window a layer has; ``rectangles`` counts all pairs of a causal pass instead, as
``torch.utils.flop_counter`` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

ATTENTION_BACKWARD = 2.5
"""Times the forward, where the kernel computes the scores again."""
NAMES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
LAYERS = ".layers."
HEADS = ("lm_head.weight", "embed_out.weight")


def unstated(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What keeps a model from being counted; empty: nothing."""
    gone = [name for name in NAMES if not isinstance(config.get(name), int)]
    if gone:
        return f"its configuration does not state {', '.join(gone)}"
    return "" if any(LAYERS in name for name in shapes) else f"no weight is of {LAYERS!r}"


@dataclass(frozen=True)
class Counted:
    """A model: its configuration, and the shapes of its weights, with which :func:`unstated` finds
    nothing wrong."""

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def width(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def vocabulary(self) -> int:
        return int(self.config["vocab_size"])

    @cached_property
    def size(self) -> int:
        """Weights, of which a head that is the embedding counts once."""
        twice = self.config.get("tie_word_embeddings") and any(n in self.shapes for n in HEADS)
        return sum(map(prod, self.shapes.values())) - bool(twice) * self.head

    @property
    def head(self) -> int:
        return self.vocabulary * self.width

    @cached_property
    def matrices(self) -> list[tuple[str, tuple[int, ...], float]]:
        """Those of the layers: name, shape, and the share of tokens that pass it."""
        return list(self._matrices())

    def _matrices(self) -> Iterator[tuple[str, tuple[int, ...], float]]:
        many, asked = (
            next((self.config[n] for n in names if self.config.get(n)), 1)
            for names in (("num_experts", "num_local_experts"), ("num_experts_per_tok",))
        )
        for name, shape in self.shapes.items():
            if LAYERS in name and len(shape) in (2, 3):
                yield name, shape, asked / many if ".experts." in name else 1.0

    @cached_property
    def macs(self) -> float:
        """Multiply-adds of a token in the layers' matrices."""
        return sum(share * prod(shape) for _, shape, share in self.matrices)

    @cached_property
    def head_dim(self) -> int:
        heads = int(self.config["num_attention_heads"])
        return int(self.config.get("head_dim") or self.width // heads)

    @property
    def pair(self) -> int:
        """FLOP of all layers' attention per (query, key)."""
        return 4 * self.layers * int(self.config["num_attention_heads"]) * self.head_dim

    def cache(self, itemsize: int) -> int:
        """Bytes of a token's keys and values."""
        heads = self.config.get("num_key_value_heads") or self.config["num_attention_heads"]
        return int(2 * self.layers * heads * self.head_dim * itemsize)

    def forward(self, rows: int, tokens: int, scored: int, *, rectangles: bool = False) -> float:
        """FLOPs of a causal pass over ``rows`` texts of ``tokens`` tokens, with the logits after
        ``scored`` of all of them."""
        seen = self._pairs(rows, tokens, rectangles) * self.pair
        return 2 * rows * tokens * self.macs + 2 * scored * self.head + seen

    def step(self, rows: int, cache: float) -> float:
        """FLOPs of one more token of each of ``rows`` texts, its logits included; ``cache`` keys
        are visible, its own among them."""
        return rows * (2 * self.macs + 2 * self.head + cache * self.pair)

    def training(
        self,
        rows: int,
        tokens: int,
        scored: int,
        *,
        adapted: bool = False,
        recompute: bool = False,
        rectangles: bool = False,
        attention_backward: float = ATTENTION_BACKWARD,
    ) -> float:
        """FLOPs of a pass and its backward. ``adapted``: adapters are trained, so a frozen matrix
        costs its input's gradient only; ``recompute``: the layers run forward once more."""
        found = self.forward(rows, tokens, scored, rectangles=rectangles)
        head = 2 * scored * self.head
        seen = self._pairs(rows, tokens, rectangles) * self.pair
        passes = 1 if adapted else 2
        again = (found - head) * recompute
        return found + again + passes * (found - seen) + attention_backward * seen

    def _pairs(self, rows: int, tokens: int, rectangles: bool) -> float:
        return rows * (tokens**2 if rectangles else tokens * (tokens + 1) / 2)
