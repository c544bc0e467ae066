"""Updates: replay, losses, gradients, steps.

All gradients of an update accumulate, each expert is clipped on its own, then one step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from unigrpo_core.engine.checks import check_reached, check_unmoved
from unigrpo_core.engine.diagnosis import causes
from unigrpo_core.engine.gap import Gap, finite
from unigrpo_core.engine.kept import Kept, Values, Velocity
from unigrpo_core.engine.losses import Losses
from unigrpo_core.engine.setup import Setup
from unigrpo_core.engine.signal import Signal, halves
from unigrpo_core.engine.trainset import MicroBatch, TrainSet
from unigrpo_core.recipe.schema import Expert
from unigrpo_core.records import Points, Replay


@dataclass(frozen=True)
class _Wanted:
    """What a forward is made for."""

    text: bool = True
    image: bool = True

    @property
    def any(self) -> bool:
        return self.text or self.image


class Updater:
    """Owns the optimizer; one call per rollout."""

    def __init__(self, setup: Setup) -> None:
        recipe = setup.recipe
        self.setup = setup
        rates = {"text": recipe.text.lr, "image": recipe.image.lr}
        owned = setup.policy.parameters()
        self.experts = {
            expert: [p for p in owned[expert].values() if p.requires_grad]
            for expert in sorted(recipe.train)
        }
        groups = [
            {"params": parameters, "lr": rates[expert], "rate": rates[expert], "expert": expert}
            for expert, parameters in self.experts.items()
        ]
        self.root: nn.Module = setup.policy.root
        self.steps: dict[Expert, int] = dict.fromkeys(self.experts, 0)
        self.calls = 0  # velocities computed so far
        if groups:
            self.root, self.optimizer = setup.accelerator.prepare(
                setup.policy.root,
                torch.optim.AdamW(
                    groups,
                    betas=recipe.optimizer.betas,
                    eps=recipe.optimizer.eps,
                    weight_decay=recipe.optimizer.weight_decay,
                    fused=setup.device.type in ("cpu", "cuda"),
                ),
            )
        wanted = {name: self._wanted(name) for name in ("reference", "ema")}
        self.anchors = {name: what for name, what in wanted.items() if what.any}
        if "reference" in self.anchors:
            setup.policy.keep("reference")
        self.rollouts = 0
        if recipe.ema.decay:
            setup.policy.keep("ema", 0.0)

    def _wanted(self, anchor: str) -> _Wanted:
        """What of an anchor's values is asked for."""
        setup, objective = self.setup, self.setup.image_objective
        return _Wanted(
            text=any(item.anchor == anchor for item in setup.text_regularizers),
            image=any(item.anchor == anchor for item in setup.image_regularizers)
            or (objective is not None and anchor in objective.needs),
        )

    def __call__(self, data: TrainSet) -> dict[str, float]:
        """Trains on a rollout and returns its metrics, those of losses from the last update."""
        setup, recipe = self.setup, self.setup.recipe
        shares = self._shares(data)
        everyone = torch.arange(len(data.owner))
        gap = Gap(recipe.compute.precision)
        kept = Kept(Values.blank(data), {name: Values.blank(data) for name in self.anchors})
        for name, values in kept.anchors.items():
            with setup.policy.weights(name):
                self._record(data, everyone, values, self.anchors[name], None)
        if recipe.ema.sample:
            with setup.policy.weights("ema"):
                self._record(data, everyone, kept.old, _Wanted(), gap)
                self._check_gap(gap, data, kept)
        elif recipe.updates.data == "disjoint":
            for rows in shares[1:]:
                self._record(data, rows, kept.old, _Wanted(), gap)
        metrics: dict[str, float] = {}
        for number, rows in enumerate(shares):
            first = not all(self.steps[expert] for expert in data.train)
            metrics |= self._update(data, rows, kept, None if number else gap)
            if first and "reference" in kept.anchors:
                self._check_reference(data, kept.anchors["reference"])
        self.rollouts += 1
        if recipe.ema.decay:
            ramp = recipe.ema.slope * self.rollouts or 1.0
            setup.policy.keep("ema", min(recipe.ema.decay, ramp))
        return {**gap.metrics(), **metrics}

    def _shares(self, data: TrainSet) -> list[Tensor]:
        """The rows of every update: whole prompts, shared out as evenly as they can be, or all."""
        rows, updates = torch.arange(len(data.owner)), self.setup.recipe.updates
        if updates.data == "repeat":
            return [rows] * updates.count
        share = data.owner * updates.count // (int(data.owner.max()) + 1)
        return [part for u in range(updates.count) if len(part := rows[share == u])]

    def _check_reference(self, data: TrainSet, kept: Values) -> None:
        """Whether the reference still computes what it did before the first update.

        Raises:
            UserError: it has moved with the weights.
        """
        everyone, recipe = torch.arange(len(data.owner)), self.setup.recipe
        rows = next(data.micro_batches(everyone, recipe.compute.replay_tokens)).rows
        now = Values.blank(data)
        with self.setup.policy.weights("reference"):
            self._record(data, rows, now, self.anchors["reference"], None)
        for was, became in ((kept.logps, now.logps), (kept.guided, now.guided)):
            if was is not None and became is not None:
                check_unmoved(was[rows], became[rows], recipe.compute.precision)

    @torch.no_grad()
    def _record(
        self, data: TrainSet, rows: Tensor, into: Values, wanted: _Wanted, gap: Gap | None
    ) -> None:
        """Fills in the wanted values of rows by forwards without gradient."""
        for batch in data.micro_batches(rows, self.setup.recipe.compute.replay_tokens):
            points = data.part(batch) if wanted.image else None
            logps, v = self._forward(data, batch, points, wanted)
            into.put(batch, logps, v)
            if gap is not None:
                self._measure(gap, data, batch, points, logps, v)

    def _forward(
        self, data: TrainSet, batch: MicroBatch, points: Points | None, wanted: _Wanted
    ) -> tuple[Tensor | None, Velocity | None]:
        setup = self.setup
        want_logps = wanted.text and batch.counts_text and "text" in data.train
        if points is None and not want_logps:
            return None, None
        replay: Replay = self.root(data.replay_batch(setup, batch, points, want_logps=want_logps))
        if points is not None:
            self.calls += points.t.numel() * (1 + len(replay.branches))
        v = None
        if replay.velocities is not None and points is not None and setup.training is not None:
            guided = replay.velocities
            if replay.branches:
                guided = setup.training.guidance.combine(guided, replay.branches, points.t)
            v = Velocity(guided, replay.velocities)
        return (replay.logps if want_logps else None), v

    @torch.no_grad()
    def _guided(self, data: TrainSet, batch: MicroBatch, points: Points) -> Tensor:
        """The trainer's velocities [B, K, *] at points of a micro-batch, after guidance."""
        _, v = self._forward(data, batch, points, _Wanted(text=False))
        assert v is not None
        return v.guided

    def _measure(
        self,
        gap: Gap,
        data: TrainSet,
        batch: MicroBatch,
        points: Points | None,
        logps: Tensor | None,
        v: Velocity | None,
    ) -> None:
        if logps is not None:
            width = logps.shape[1]
            gap.text(logps.detach(), data.logps[batch.rows, :width], data.mask[batch.rows, :width])
        objective = self.setup.image_objective
        if v is not None and points is not None and objective is not None and not self._fresh:
            gap.image(objective, points, v.guided.detach())

    def _update(
        self, data: TrainSet, rows: Tensor, kept: Kept, gap: Gap | None
    ) -> dict[str, float]:
        """One optimizer step on the rows. With ``gap``, it is the rollout's first: its own forward
        gives the old values, unless the average sampled, and the gap is checked before the step."""
        setup, losses = self.setup, Losses(self.setup, data, rows, kept)
        own = gap is not None and not setup.recipe.ema.sample
        signal = Signal({expert: self.experts[expert] for expert in data.train})
        measured = gap is not None and self._measures_signal()
        parts = halves(rows, data.owner) if measured else (rows,)
        twice = gap is not None
        for number, part in enumerate(parts):
            if number:
                signal.half()
            for batch in data.micro_batches(part, setup.recipe.compute.replay_tokens):
                points = data.part(batch)
                logps, v = self._forward(data, batch, points, _Wanted())
                if gap is not None and own:
                    self._measure(gap, data, batch, points, logps, v)
                    kept.old.put(batch, logps, v)
                if gap is not None and twice:
                    twice = False
                    if v is not None and points is not None and not self._fresh:
                        self._measure_twice(gap, data, batch, points, v)
                loss = losses(batch, points, logps, v)
                if loss.requires_grad:
                    setup.accelerator.backward(loss)
        if gap is not None:
            self._check_gap(gap, data, kept)
        if own or not any(self.steps.values()):  # where every ratio is 1, so none is clipped
            check_reached(
                {expert: self.experts[expert] for expert in data.train},
                {
                    "text": data.text_advantages[rows] * setup.recipe.text.weight,
                    "image": data.image_advantages[rows] * setup.recipe.image.weight,
                },
            )
        return {**losses.metrics(), **signal.metrics(), **self._step(data.train)}

    def _check_gap(self, gap: Gap, data: TrainSet, kept: Kept) -> None:
        """Whether the trainer's values are the sampler's.

        Raises:
            UserError: they are not.
        """
        problems = gap.problems()
        if problems:
            again = partial(self._guided, data)
            raise gap.error(problems, causes(problems, self.setup, data, kept.old, again))

    @property
    def _fresh(self) -> bool:
        """Whether the sampler stored nothing at the points."""
        objective = self.setup.image_objective
        return objective is not None and objective.fresh

    def _measures_signal(self) -> bool:
        """Whether it is the turn of the rollout that begins."""
        every = self.setup.recipe.optimizer.signal_every
        return bool(every) and self.rollouts % every == 0

    def _measure_twice(
        self, gap: Gap, data: TrainSet, batch: MicroBatch, points: Points, v: Velocity
    ) -> None:
        assert self.setup.image_objective is not None
        again = self._guided(data, batch, points)
        gap.own(self.setup.image_objective, points, v.guided.detach(), again)

    def _step(self, train: frozenset[Expert]) -> dict[str, float]:
        """One step of these experts; the others' gradients are forgotten."""
        recipe = self.setup.recipe.optimizer
        found: dict[str, float] = {}
        for expert, parameters in self.experts.items():
            if expert not in train:
                for parameter in parameters:
                    parameter.grad = None
                continue
            norm = nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
            finite(f"the gradient of the {expert} expert", norm)
            found[f"{expert}/grad_norm"] = float(norm)
            self.steps[expert] += 1
        for group in self.optimizer.param_groups:
            warm = self.steps[group["expert"]] / max(1, recipe.warmup_updates)
            group["lr"] = group["rate"] * min(1.0, warm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return found
