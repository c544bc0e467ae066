"""BAGEL's side of ``unigrpo check --memory``: a workload as bytes, calls and FLOPs. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unigrpo_core.errors import UserError
from unigrpo_core.workload import Account, Calls, Held, Memory, MicroBatch, Work, Workload
from unigrpo_models.bagel import accounting
from unigrpo_models.bagel.accounting import BOUNDARY, LORA_MODULES
from unigrpo_models.bagel.config import BagelConfig
from unigrpo_models.checkpoints import checkpoint_folder

if TYPE_CHECKING:
    from unigrpo_models.bagel.provider import BagelOptions

FLOAT32 = 4
COMMON = 128  # a text's width in bf16 is the next multiple of it
LOGITS_BYTES = 20  # a number: as computed, scaled, masked, for the sum, and its gradient
DRAW_BYTES = 32  # a number when tokens are drawn: logits, and three of float64


def account(options: BagelOptions, load: Workload) -> Account:
    """What a training step of the workload takes.

    Raises:
        UserError: the checkpoint's configuration does not fit, or its images are of another size.
    """
    model, config, assumed = _config(options)
    return _Counted(config, _adapters(options), load).account(model, assumed)


def _config(options: BagelOptions) -> tuple[str, BagelConfig, tuple[str, ...]]:
    """The model's name and sizes, and what has been assumed of them."""
    try:
        folder = checkpoint_folder(options.checkpoint)
    except UserError:
        folder = None
    if folder is None or not (folder / "llm_config.json").exists():
        said = f"the sizes are the published model's, since {options.checkpoint} is not there yet"
        return "BAGEL-7B-MoT", BagelConfig.published(), (said,)
    return f"the checkpoint {options.checkpoint}", BagelConfig.read(folder), ()


@dataclass(frozen=True)
class _Adapters:
    """Low-rank adapters: their rank (0: none), and the matrices that have one, by expert."""

    rank: int
    modules: Mapping[str, tuple[str, ...]]

    def experts(self, train: frozenset[str]) -> frozenset[str]:
        return frozenset(e for e in train if self.rank and self.modules.get(e))


def _adapters(options: BagelOptions) -> _Adapters:
    """Those on the layers' matrices; the few that may be elsewhere weigh next to nothing."""
    named = {expert: getattr(options, f"lora_{expert}", ()) for expert in ("text", "image")}
    ends = {
        expert: [name.split(".")[-1].removesuffix("_moe_gen") for name in names]
        for expert, names in named.items()
    }
    known = {e: tuple(n for n in names if n in LORA_MODULES) for e, names in ends.items()}
    return _Adapters(getattr(options, "lora_rank", 0), known)


@dataclass(frozen=True)
class _Counted:
    config: BagelConfig
    adapters: _Adapters
    load: Workload

    def account(self, model: str, assumed: tuple[str, ...]) -> Account:
        load, latent = self.load, self.config.latent
        for side in load.size if load.images else ():
            if side % latent.stride or side > latent.stride * latent.max_size:
                raise UserError(
                    f"an image side of {side}: this model draws multiples of {latent.stride} "
                    f"pixels up to {latent.stride * latent.max_size}"
                )
        calls = load.calls(self.latents + BOUNDARY, latent.time_shift)
        beside = ("the autoencoder's passes",) if latent.space == "flux" else ()
        left = ", ".join((*beside, "rewards", "fragmentation", "the CUDA context"))
        thought = f"every thought has {load.max_tokens} tokens, the most; " if load.thoughts else ""
        return Account(
            model=model,
            memory=tuple(part for part in self._memory() if part.bytes),
            work={name: work for name, work in self._work(calls).items() if work.bytes},
            calls=calls,
            images=load.images,
            assumptions=(
                *assumed,
                f"{thought}a prompt takes {load.prompt_tokens}; nothing is shared between rows"
                + ("; unconditional contexts are empty" if load.branches else ""),
                f"not counted: {left}, evaluation",
            ),
        )

    # --- sizes --------------------------------------------------------------------------------

    @property
    def itemsize(self) -> int:
        return FLOAT32 if self.load.precision == "float32" else 2

    @property
    def latents(self) -> int:
        """Latent tokens of an image."""
        height, width = self.load.size
        stride = self.config.latent.stride
        return (height // stride) * (width // stride) if self.load.images else 0

    @property
    def context(self) -> int:
        """Tokens of a context as they are computed."""
        tokens = self.load.context
        return tokens if self.itemsize == FLOAT32 else tokens + COMMON - tokens % COMMON

    @property
    def lora(self) -> frozenset[str]:
        return self.adapters.experts(self.load.train)

    @property
    def full(self) -> frozenset[str]:
        return self.load.train - self.lora

    def _trained(self) -> int:
        return accounting.trained_parameters(
            self.config,
            self.load.train,
            self.lora,
            rank=self.adapters.rank,
            modules=self.adapters.modules,
        )

    # --- memory -------------------------------------------------------------------------------

    def _memory(self) -> list[Memory]:
        load, counts = self.load, accounting.parameters(self.config)
        trained, whole = self._trained(), sum(accounting.owned(self.config, e) for e in self.full)
        frozen = sum(counts.values()) - whole - counts["tables"]
        weights = FLOAT32 * (trained + counts["tables"]) + self.itemsize * frozen
        embedded = counts["embedding"] if "text" in self.full else 0
        cast = self.itemsize * (whole - embedded) if self.itemsize < FLOAT32 else 0
        copy = FLOAT32 * whole if load.reference else 0
        held: Held = "always" if load.reference_on == "device" else "host"
        gradients = FLOAT32 * trained * (1 + load.signal)
        return [
            Memory("weights", weights, note="float32 where trained"),
            Memory("cast weights", cast, note="of what is trained, while a pass computes in bf16"),
            Memory("reference", copy, held, note="a copy of what is trained"),
            Memory("optimizer", 2 * FLOAT32 * trained, note="two moments in float32"),
            Memory("gradients", gradients, "update", note="float32"),
            Memory("activations", self._activations(), "update", note=self._micro_batch()),
            Memory("logits", self._logits(), "update"),
            Memory("cache", self._cache(), "rollout", note="of texts, twice while it is renewed"),
            Memory("denoising", self._denoising(), "rollout", note="the widest layer's numbers"),
            Memory("drawing tokens", self._drawing(), "rollout"),
        ]

    @property
    def share(self) -> int:
        """Contexts of an update."""
        return self.load.rows // self.load.updates if self.load.disjoint else self.load.rows

    def _batches(self) -> tuple[MicroBatch, ...]:
        """The micro-batches of an update."""
        return self.load.micro_batches(self.share, self.latents + BOUNDARY)

    def _micro_batch(self) -> str:
        batch = max(self._batches(), key=self._kept)
        images = f" with {len(batch.columns)} points each" if batch.columns else ""
        contexts = "1 context" if batch.rows == 1 else f"{batch.rows} contexts"
        return f"{contexts}{images}, checkpointing {self.load.checkpointing!r}"

    def _activations(self) -> float:
        return max(map(self._kept, self._batches())) if self.load.train else 0.0

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
        rows = max(batch.rows for batch in self._batches())
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

    # --- work ---------------------------------------------------------------------------------

    def _work(self, calls: tuple[Calls, ...]) -> dict[str, Work]:
        """By phase of a step, the mean over the rollouts."""
        load, adapters = self.load, self.adapters
        step = accounting.optimizer(
            self.config, load.train, self.lora, rank=adapters.rank, modules=adapters.modules
        )
        later = load.updates - 1 if load.disjoint else 0
        reference = int(load.reference)
        return {
            "reading": self._reading(),
            "writing": self._writing(),
            "denoising": self._denoised(calls),
            "reference": reference
            * self._replay(load.reference_text, load.reference_image)
            * (load.rows / self.share)
            + self._branches(calls, "reference"),
            "old values": later * self._replay(True, True) + self._branches(calls, "old"),
            "forward and backward": load.updates * self._replay(True, True, load.train)
            + self._branches(calls, "update", load.train),
            "optimizer": load.updates * step,
        }

    def _chunks(self) -> list[int]:
        """Rows of thoughts that are written at once."""
        rows, most = self.load.thoughts, self.load.rollout_rows
        return [min(most, rows - start) for start in range(0, rows, most)]

    def _reading(self) -> Work:
        """Prompts, and in bf16 the thoughts after they have been written."""
        load, config, size = self.load, self.config, self.itemsize
        work = accounting.prefill(config, load.prompts, load.prompt_tokens, itemsize=size)
        for rows in self._chunks() if size < FLOAT32 else ():
            work += accounting.prefill(config, rows, self.context, itemsize=size)
        return work

    def _writing(self) -> Work:
        work, turns = Work(), self.load.max_tokens + 1  # [bos], then every token
        cache = self.load.prompt_tokens + (turns + 1) / 2
        for rows in self._chunks():
            step = accounting.decode_step(self.config, rows, cache, itemsize=self.itemsize)
            work += turns * step
        return work

    def _denoised(self, calls: tuple[Calls, ...]) -> Work:
        if not calls:
            return Work()
        unguided = sum(one.unguided for one in calls) / len(calls)
        guided = sum(one.sampling for one in calls) / len(calls) - unguided
        at_once = min(self.load.rollout_images, self.load.rollout_rows, self.load.images)
        plain, bare = (
            accounting.velocity(self.config, at_once, self.latents, seen, itemsize=self.itemsize)
            for seen in (self.load.context, 0)
        )
        return unguided / at_once * plain + guided / at_once * bare

    def _replay(self, text: bool, image: bool, train: frozenset[str] = frozenset()) -> Work:
        """The replays of an update's contexts, for log-probs and for velocities."""
        load, work = self.load, Work()
        text, image = text and load.scored, image and load.points > 0
        for batch in self._batches() if text or image else ():
            scored = text and batch.columns.start == 0  # its text counts in the first part only
            work += accounting.replay(
                self.config,
                batch.rows,
                self.context,
                len(batch.columns) if image else 0,
                self.latents,
                scored=batch.rows * load.max_tokens * scored,
                train=train,
                lora=self.lora,
                recompute=load.checkpointing == "full",
                context_gradient=load.context_gradient,
                itemsize=self.itemsize,
            )
        return work

    def _branches(
        self, calls: tuple[Calls, ...], phase: str, train: frozenset[str] = frozenset()
    ) -> Work:
        """The velocities in unconditional contexts of a phase's replays."""
        load = self.load
        if not calls or not load.branches:
            return Work()
        mean = sum(getattr(one, phase) for one in calls) / len(calls)
        plain = {
            "reference": load.rows,
            "old": (load.updates - 1) * self.share,
            "update": load.updates * self.share,
        }[phase] * load.columns
        one = accounting.replay(
            self.config,
            1,
            0,
            1,
            self.latents,
            train=train,
            lora=self.lora,
            recompute=load.checkpointing == "full",
            itemsize=self.itemsize,
        )
        return Work(max(0.0, mean - plain) * one.flops)
