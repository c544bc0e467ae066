"""FLOPs and bytes moved of a workload on BAGEL, by phase. No torch."""

from __future__ import annotations

from unigrpo_core.workload import Calls, Work
from unigrpo_models.bagel import accounting
from unigrpo_models.bagel.counted import FLOAT32, Counted


class PhaseWork(Counted):
    def phases(self, calls: tuple[Calls, ...]) -> dict[str, Work]:
        """By phase of a step, the mean over the rollouts."""
        load, adapters = self.load, self.adapters
        step = accounting.optimizer(
            self.config, load.train, self.lora, rank=adapters.rank, modules=adapters.modules
        )
        reference, whole = int(load.reference), load.rows / self.share
        average = int(load.average_text or load.average_image)
        return {
            "reading": self._reading(),
            "writing": self._writing(),
            "denoising": self._denoised(calls),
            "reference": reference * self._replay(load.reference_text, load.reference_image) * whole
            + self._branches(calls, "reference"),
            "moving average": average * self._replay(load.average_text, load.average_image) * whole
            + self._branches(calls, "average"),
            "old values": load.old_rows / self.share * self._replay(True, True)
            + self._branches(calls, "old"),
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
        for batch in self.batches() if text or image else ():
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
            "average": load.rows,
            "old": load.old_rows,
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
