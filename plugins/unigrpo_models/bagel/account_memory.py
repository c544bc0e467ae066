"""The bytes that a workload holds on BAGEL's device. No torch."""

from __future__ import annotations

from unigrpo_core.workload import Held, Memory, MicroBatch
from unigrpo_models.bagel import accounting
from unigrpo_models.bagel.accounting import BOUNDARY
from unigrpo_models.bagel.counted import FLOAT32, Counted

LOGITS_BYTES = 20  # a number: as computed, scaled, masked, for the sum, and its gradient
DRAW_BYTES = 32  # a number when tokens are drawn: logits, and three of float64


class HeldMemory(Counted):
    def parts(self) -> list[Memory]:
        load, counts = self.load, accounting.parameters(self.config)
        trained, whole = self.trained(), sum(accounting.owned(self.config, e) for e in self.full)
        frozen = sum(counts.values()) - whole - counts["tables"]
        weights = FLOAT32 * (trained + counts["tables"]) + self.itemsize * frozen
        embedded = counts["embedding"] if "text" in self.full else 0
        cast = self.itemsize * (whole - embedded) if self.itemsize < FLOAT32 else 0
        copy = FLOAT32 * whole if load.reference else 0
        average = FLOAT32 * trained if load.averaged else 0
        held: Held = "always" if load.reference_on == "device" else "host"
        gradients = FLOAT32 * trained * (1 + load.signal)
        return [
            Memory("weights", weights, note="float32 where trained"),
            Memory("cast weights", cast, note="of what is trained, while a pass computes in bf16"),
            Memory("reference", copy, held, note="a copy of what is trained"),
            Memory("moving average", average, held, note="of what is trained"),
            Memory("optimizer", 2 * FLOAT32 * trained, note="two moments in float32"),
            Memory("gradients", gradients, "update", note="float32"),
            Memory("activations", self._activations(), "update", note=self._micro_batch()),
            Memory("logits", self._logits(), "update"),
            Memory("cache", self._cache(), "rollout", note="of texts, twice while it is renewed"),
            Memory("denoising", self._denoising(), "rollout", note="the widest layer's numbers"),
            Memory("drawing tokens", self._drawing(), "rollout"),
        ]

    def _micro_batch(self) -> str:
        batch = max(self.batches(), key=self._kept)
        images = f" with {len(batch.columns)} points each" if batch.columns else ""
        contexts = "1 context" if batch.rows == 1 else f"{batch.rows} contexts"
        return f"{contexts}{images}, checkpointing {self.load.checkpointing!r}"

    def _activations(self) -> float:
        return max(map(self._kept, self.batches())) if self.load.train else 0.0

    def _kept(self, batch: MicroBatch) -> float:
        """Bytes kept for the backward pass of a micro-batch."""
        rows, points = batch.rows, len(batch.columns)
        tokens = rows * self.context if "text" in self.load.train else 0
        tokens += rows * points * (self.latents + BOUNDARY)
        keys = accounting.cache_bytes(self.config, rows * points, self.context, self.itemsize)
        return accounting.activation_bytes(
            self.config, tokens, self.itemsize, self.load.checkpointing
        ) + (keys if self.load.checkpointing != "full" else 0)

    def _logits(self) -> float:
        if not self.load.scored:
            return 0.0
        rows = max(batch.rows for batch in self.batches())
        return LOGITS_BYTES * rows * self.load.max_tokens * self.config.llm.vocab_size

    def _cache(self) -> float:
        rows = min(self.load.rows, self.load.rollout_rows)
        return 2 * accounting.cache_bytes(self.config, rows, self.context, self.itemsize)

    def _denoising(self) -> float:
        rows = min(self.load.images, self.load.rollout_images, self.load.rollout_rows)
        width = 3 * self.config.llm.intermediate_size + 2 * self.config.llm.hidden_size
        return rows * (self.latents + BOUNDARY) * width * self.itemsize

    def _drawing(self) -> float:
        rows = min(self.load.thoughts, self.load.rollout_rows)
        return DRAW_BYTES * rows * self.config.llm.vocab_size
