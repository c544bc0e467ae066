"""The painters' side of ``unigrpo check --memory``: a workload as bytes, calls and FLOPs, by the
configurations of a pipeline and the headers of its weights. No torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import local_folder
from unigrpo_core.workload import Account, Calls, Held, Memory, Work, Workload
from unigrpo_models.held import (
    ASSUMED,
    FLOAT32,
    OPTIMIZER_BYTES,
    PerNumber,
    Trained,
    activations,
    adapted,
    bytes_of,
)
from unigrpo_models.painters.counted import Tokens, Transformer, products, width_of
from unigrpo_models.painters.folder import (
    FILES,
    SCHEDULER,
    Shift,
    grid_of,
    read_json,
    stride_of,
    weights_of,
)
from unigrpo_models.stored import stored_shapes

if TYPE_CHECKING:
    from unigrpo_models.painters.options import PainterOptions

ENCODERS = "text_encoder"
# Measured on sd3, flux and sana of 128 numbers a token, which keep within a sixth of it.
ACTIVATIONS: PerNumber = {(4, False): 5.2, (2, False): 3.1, (4, True): 3.4, (2, True): 2.0}
TABLE = "pos_embed.pos_embed"  # never trained


def account(kind: Transformer, options: PainterOptions, load: Workload) -> Account | str:
    """What a training step of the workload takes; a text if the weights' headers are not there.

    Raises:
        UserError: a file is damaged, or its images are of another size.
    """
    try:
        folder = local_folder("checkpoint", options.checkpoint, FILES)
    except UserError as error:
        return f"sizes are read from the weights' headers: {error}"
    named = [folder / name for name in weights_of(folder)]
    files = [file for file in named if getattr(options, file.parent.name, True)]  # text_encoder_3
    if gone := [file for file in files if not file.is_file()]:
        return f"sizes are read from the weights' headers, and {gone[0]} is not there yet"
    return Painting(kind, options, load, folder, files).account()


@dataclass(frozen=True)
class Painting:
    """A workload on a pipeline's folder, of whose weights these files are read."""

    kind: Transformer
    options: PainterOptions
    load: Workload
    folder: Path
    files: list[Path]

    def account(self) -> Account:
        calls = self.load.calls(self.each.all, self.shift)
        return Account(
            model=f"the pipeline {self.options.checkpoint}",
            memory=tuple(part for part in self._memory() if part.bytes),
            work={name: work for name, work in self._work(calls).items() if work != Work()},
            calls=calls,
            images=self.load.images,
            assumptions=(
                *ASSUMED,
                "not counted either: the text encoders' and the autoencoder's passes",
            ),
            image_tokens=self.each.all,
        )

    # --- sizes ------------------------------------------------------------------------------------

    def _config(self, part: str) -> dict[str, Any]:
        return read_json(self.folder / part / "config.json", "is not there")

    @cached_property
    def config(self) -> Mapping[str, Any]:
        found = self._config("transformer")
        if found.get("_class_name") != self.kind.name:
            raise UserError(
                f"{self.folder}: its transformer is a {found.get('_class_name')}; this policy "
                f"takes {self.kind.name}"
            )
        return found

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return stored_shapes(file for file in self.files if file.parent.name == "transformer")

    @cached_property
    def each(self) -> Tokens:
        """Of an image, by the pipeline's geometry."""
        stride = (self.kind.patch or self.config["patch_size"]) * stride_of(self._config("vae"))
        limit = self.config.get("pos_embed_max_size")
        height, width = grid_of(self.load.size, stride, limit)
        short = self._config(ENCODERS)["max_position_embeddings"] if self.kind.clip else 0
        return Tokens(height * width, short + getattr(self.options, "max_text_tokens", 0))

    @cached_property
    def shift(self) -> float:
        return Shift(read_json(self.folder / SCHEDULER, "is not there"))(self.each.image)

    @cached_property
    def trained(self) -> Trained:
        size = sum(map(prod, self.shapes.values()))
        options, trains = self.options, "image" in self.load.train
        if not trains or not options.lora_rank:
            fixed = prod(self.shapes.get(TABLE, (0,)))
            return Trained(size, (size - fixed) * trains, 0, self.load)
        targets = options.lora_image or self.kind.targets
        rank = options.lora_rank
        return Trained(size, 0, adapted("image", self.shapes, targets, rank), self.load)

    def _beside(self, name: str) -> int:
        """Numbers of the components whose folder is called so, or begins so."""
        files = [file for file in self.files if file.parent.name.startswith(name)]
        shapes = [stored_shapes([file]) for file in files]  # whose names may be the same
        return sum(prod(shape) for each in shapes for shape in each.values())

    # --- memory -----------------------------------------------------------------------------------

    def _memory(self) -> list[Memory]:
        encoders: Held = "host" if self.options.text_encoders == "host" else "always"
        itemsize = bytes_of(self.load)
        return [
            *self.trained.parts(),
            Memory("text encoders", itemsize * self._beside(ENCODERS), encoders),
            Memory("autoencoder", FLOAT32 * self._beside("vae"), note="float32"),
            Memory("activations", self._activations(), "update", note=self._micro_batch()),
            Memory("denoising", self._denoising(), "rollout", note="the widest layer's numbers"),
        ]

    @cached_property
    def points(self) -> int:
        """Points of the largest micro-batch."""
        share = self.load.rows // (self.load.updates if self.load.disjoint else 1)
        batches = self.load.micro_batches(share, self.each.all)
        return max(batch.rows * len(batch.columns) for batch in batches)

    @property
    def branches(self) -> int:
        """Contexts of a point where it has the most."""
        return 1 + self.load.branches * any(self.load.guided(self.shift))

    def _micro_batch(self) -> str:
        contexts = f" in {self.branches} contexts" if self.branches > 1 else ""
        return f"{self.points} points{contexts}, checkpointing {self.load.checkpointing!r}"

    def _activations(self) -> float:
        if not self.trained.moved or not self.load.points:
            return 0.0
        kept: Counter[str] = Counter()
        outputs = 0
        for name, shape in products(self.shapes):
            if block := re.match(r"(.*blocks\.\d+)\.", name):
                tokens = self.kind.tokens(name, self.each)
                kept[block[1]] += tokens * (shape[0] + max(shape[1], shape[0] * (shape[1] == 1)))
                outputs += tokens * shape[0]
        inputs = len(kept) * self.each.all * width_of(self.config)
        each = ACTIVATIONS[bytes_of(self.load), bool(self.trained.adapters)]
        one = activations(self.load, each, kept.values(), outputs, inputs)
        return one * self.points * self.branches

    @property
    def _at_once(self) -> int:
        """Images that are denoised in one call."""
        return min(self.load.images, self.load.rollout_images, self.load.rollout_rows)

    def _denoising(self) -> float:
        widest = max(
            self.kind.tokens(name, self.each) * sum(shape[:2])
            for name, shape in products(self.shapes)
        )
        return bytes_of(self.load) * self._at_once * widest

    # --- work -------------------------------------------------------------------------------------

    def _work(self, calls: tuple[Calls, ...]) -> dict[str, Work]:
        """By phase of a step, the mean over the rollouts. The weights are read once a call."""
        load, size = self.load, bytes_of(self.load) * self.trained.size
        forward = self.kind.forward(self.shapes, self.config, self.each)
        again = load.checkpointing == "full"
        both = self.kind.training(
            self.shapes,
            self.config,
            self.each,
            adapted=bool(self.trained.adapters),
            recompute=again,
        )

        def phase(name: str, flops: float, together: int, passes: int = 1) -> Work:
            count: float = sum(getattr(one, name) for one in calls) / max(1, len(calls))
            return Work(flops, passes * size / max(1, together)) * count

        return {
            "denoising": phase("sampling", forward, self._at_once),
            "reference": phase("reference", forward, self.points),
            "moving average": phase("average", forward, self.points),
            "old values": phase("old", forward, self.points),
            "forward and backward": phase("update", both, self.points, 2 + again),
            "optimizer": load.updates * Work(0.0, OPTIMIZER_BYTES * self.trained.moved),
        }
