"""A language model's side of ``unigrpo check --memory``: bytes and FLOPs. No torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import local_folder
from unigrpo_core.workload import Account, Memory, Work, Workload
from unigrpo_models.causal.counted import Counted, unstated
from unigrpo_models.causal.files import CONFIG, FILES, weight_files
from unigrpo_models.held import (
    ASSUMED,
    OPTIMIZER_BYTES,
    PerNumber,
    Trained,
    activations,
    adapted,
    bytes_of,
)
from unigrpo_models.stored import stored_shapes

if TYPE_CHECKING:
    from unigrpo_models.causal.options import CausalOptions

# Measured on Qwen2, Qwen3 and Llama of 128 numbers a token, which keep within a sixth of it.
ACTIVATIONS: PerNumber = {(4, False): 4.7, (2, False): 3.2, (4, True): 4.2, (2, True): 2.4}
LOGITS = 1 << 26  # numbers at a time, in the update
LOGITS_BYTES = 20  # a number: as computed, scaled, masked, for the sum, and its gradient
DRAW_BYTES = 32  # a number when tokens are drawn: logits, and three of float64


def account(options: CausalOptions, load: Workload) -> Account | str:
    """What a training step of the workload takes; a text if the weights' headers are not there, or
    sizes have other names than they mostly have.

    Raises:
        UserError: a file is damaged, or a target of the adapters binds nothing.
    """
    try:
        folder = local_folder("checkpoint", options.checkpoint, FILES)
        files = weight_files(folder)
    except UserError as error:
        return f"sizes are read from the weights' headers: {error}"
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config = {**found, **(found.get("text_config") or {})}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read: {error}") from error
    shapes = stored_shapes(files)
    if lacks := unstated(config, shapes):
        return f"sizes of {folder} are not known: {lacks}"
    return Writing(options, load, Counted(config, shapes)).account()


@dataclass(frozen=True)
class Writing:
    """A workload on a model."""

    options: CausalOptions
    load: Workload
    counted: Counted

    def account(self) -> Account:
        load = self.load
        return Account(
            model=f"the model {self.options.checkpoint}",
            memory=tuple(part for part in self._memory() if part.bytes),
            work={name: work for name, work in self._work().items() if work != Work()},
            calls=(),
            images=0,
            assumptions=(
                f"every thought has {load.max_tokens} tokens, the most; a prompt takes "
                f"{load.prompt_tokens}",
                *ASSUMED,
            ),
        )

    @cached_property
    def trained(self) -> Trained:
        options, size = self.options, self.counted.size
        trains = "text" in self.load.train
        if not trains or not options.lora_rank:
            return Trained(size, size * trains, 0, self.load)
        rank = options.lora_rank
        added = adapted("text", self.counted.shapes, options.lora_text, rank)
        return Trained(size, 0, added, self.load)

    @property
    def _share(self) -> int:
        """Contexts of an update."""
        return self.load.rows // (self.load.updates if self.load.disjoint else 1)

    @property
    def _rows(self) -> int:
        """Contexts of the largest micro-batch."""
        return max(batch.rows for batch in self.load.micro_batches(self._share, 0))

    @property
    def _tokens(self) -> int:
        """Of a text in a replay: all but the last, which predicts nothing."""
        return self.load.prompt_tokens + self.load.max_tokens - 1

    # --- memory -----------------------------------------------------------------------------------

    def _memory(self) -> list[Memory]:
        load, words = self.load, self.counted.vocabulary
        rows = min(load.thoughts, load.rollout_rows)
        cache = self.counted.cache(bytes_of(load)) * (load.prompt_tokens + load.max_tokens)
        logits = min(LOGITS, self._rows * load.max_tokens * words) if load.scored else 0
        note = f"{self._rows} texts, checkpointing {load.checkpointing!r}"
        return [
            *self.trained.parts(),
            Memory("activations", self._activations(), "update", note=note),
            Memory("logits", LOGITS_BYTES * logits, "update"),
            Memory("cache", rows * cache, "rollout", note="of texts"),
            Memory("drawing tokens", DRAW_BYTES * rows * words, "rollout"),
        ]

    def _activations(self) -> float:
        if not self.trained.moved:
            return 0.0
        kept: dict[str, float] = {}
        outputs = 0.0
        for name, shape, share in self.counted.matrices:
            if block := re.search(r"\.layers\.\d+\.", name):
                kept[block[0]] = kept.get(block[0], 0.0) + share * sum(shape[-2:])
                outputs += share * shape[-2]
        inputs = self.counted.layers * self.counted.width
        each = ACTIVATIONS[bytes_of(self.load), bool(self.trained.adapters)]
        one = activations(self.load, each, kept.values(), outputs, inputs)
        return one * self._rows * self._tokens

    # --- work -------------------------------------------------------------------------------------

    def _work(self) -> dict[str, Work]:
        load, counted = self.load, self.counted
        itemsize = bytes_of(load)
        weights, cache = itemsize * counted.size, counted.cache(itemsize)
        read, write = Work(), Work()
        for start in range(0, load.thoughts, load.rollout_rows):
            rows = min(load.rollout_rows, load.thoughts - start)
            prompts = -(-rows * load.prompts // load.thoughts)  # each is read once
            flops = counted.forward(prompts, load.prompt_tokens, prompts)
            read += Work(flops, weights + prompts * load.prompt_tokens * cache)
            turns = load.max_tokens - 1  # the last token is not fed
            seen = load.prompt_tokens + (turns + 1) / 2
            one = Work(counted.step(rows, seen), weights + rows * seen * cache)
            write += turns * one
        again = load.checkpointing == "full"
        asked = self._tokens, load.max_tokens
        plain = Work(counted.forward(1, *asked), weights / self._rows)
        flops = counted.training(1, *asked, adapted=bool(self.trained.adapters), recompute=again)
        both = Work(flops, (2 + again) * weights / self._rows)
        return {
            "reading": read,
            "writing": write,
            "reference": load.rows * load.reference_text * plain,
            "moving average": load.rows * load.average_text * plain,
            "old values": load.old_rows * load.scored * plain,
            "forward and backward": load.updates * self._share * load.scored * both,
            "optimizer": load.updates * Work(0.0, OPTIMIZER_BYTES * self.trained.moved),
        }
