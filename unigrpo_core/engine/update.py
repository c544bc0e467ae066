"""Updates: replay, losses, gradients, steps.

Total = text.weight x L_text + image.weight x L_image + sum of w_r x R_r, where every L and R is
sum(values x weights) / sum(weights) over the whole update. All gradients accumulate, each expert
is clipped on its own, then one step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from unigrpo_core.engine.checks import check_reached, check_unmoved
from unigrpo_core.engine.diagnosis import causes
from unigrpo_core.engine.gap import Gap, finite
from unigrpo_core.engine.setup import Setup
from unigrpo_core.engine.trainset import MicroBatch, TrainSet
from unigrpo_core.records import FlowStep, Points, Replay, TokenStep


@dataclass(frozen=True, eq=False)
class Velocity:
    """A micro-batch's velocities, [B, K, *]."""

    guided: Tensor
    conditional: Tensor


@dataclass(frozen=True, eq=False)
class Values:
    """Kept values of every context: of the trainer before the first update, or of an anchor."""

    logps: Tensor  # float32 [B, L]
    guided: Tensor | None  # float32 [B, K, *], after guidance
    conditional: Tensor | None  # float32 [B, K, *]

    @classmethod
    def blank(cls, data: TrainSet) -> Values:
        shape = None if data.points is None else data.points.x_t
        guided = None if shape is None else torch.zeros_like(shape)
        return cls(
            torch.zeros_like(data.logps),
            guided,
            None if shape is None else torch.zeros_like(shape),
        )

    def put(self, batch: MicroBatch, logps: Tensor | None, v: Velocity | None) -> None:
        if logps is not None:
            self.logps[batch.rows, : logps.shape[1]] = logps.detach()
        if v is not None and self.guided is not None and self.conditional is not None:
            self.guided[batch.rows, batch.columns] = v.guided.detach()
            self.conditional[batch.rows, batch.columns] = v.conditional.detach()


@dataclass(frozen=True)
class _Wanted:
    """What a forward is made for."""

    text: bool = True
    image: bool = True

    @property
    def any(self) -> bool:
        return self.text or self.image


@dataclass(frozen=True, eq=False)
class Kept:
    """The values that losses compare with."""

    old: Values
    reference: Values | None

    def anchor(self, name: str) -> Values:
        kept = self.old if name == "old" else self.reference
        assert kept is not None
        return kept


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
            {"params": parameters, "lr": rates[expert], "rate": rates[expert]}
            for expert, parameters in self.experts.items()
        ]
        self.root: nn.Module = setup.policy.root
        self.updates = 0
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
        self.reference = _Wanted(
            text=any(item.anchor == "reference" for item in setup.text_regularizers),
            image=any(item.anchor == "reference" for item in setup.image_regularizers)
            or (setup.image_objective is not None and "reference" in setup.image_objective.needs),
        )
        if self.reference.any:
            setup.policy.keep("reference")

    def __call__(self, data: TrainSet) -> dict[str, float]:
        """Trains on a rollout and returns its metrics, those of losses from the last update."""
        recipe, prompts = self.setup.recipe, len(set(data.owner.tolist()))
        count = recipe.updates.count
        share = prompts // count if recipe.updates.data == "disjoint" else prompts
        shares = [
            torch.arange(len(data.owner))[(data.owner // share == u) | (share == prompts)]
            for u in range(count)
        ]
        everyone = torch.arange(len(data.owner))
        gap = Gap(recipe.compute.precision)
        reference = Values.blank(data) if self.reference.any else None
        kept = Kept(Values.blank(data), reference)
        if reference is not None:
            with self.setup.policy.weights("reference"):
                self._record(data, everyone, reference, self.reference, None)
        if recipe.updates.data == "disjoint":
            for rows in shares[1:]:
                self._record(data, rows, kept.old, _Wanted(), gap)
        metrics: dict[str, float] = {}
        for number, rows in enumerate(shares):
            first = self.updates == 0
            metrics = self._update(data, rows, kept, gap if number == 0 else None)
            if first and reference is not None:
                self._check_reference(data, reference)
        return {**gap.metrics(), **metrics}

    def _check_reference(self, data: TrainSet, kept: Values) -> None:
        """Whether the reference still computes what it did before the first update.

        Raises:
            UserError: it has moved with the weights.
        """
        everyone, recipe = torch.arange(len(data.owner)), self.setup.recipe
        rows = next(data.micro_batches(everyone, recipe.compute.replay_tokens)).rows
        now = Values.blank(data)
        with self.setup.policy.weights("reference"):
            self._record(data, rows, now, self.reference, None)
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
        want_logps = wanted.text and batch.counts_text and setup.text_objective is not None
        if points is None and not want_logps:
            return None, None
        replay: Replay = self.root(data.replay_batch(setup, batch, points, want_logps=want_logps))
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
        if v is not None and points is not None and self.setup.image_objective is not None:
            gap.image(self.setup.image_objective, points, v.guided.detach())

    def _update(
        self, data: TrainSet, rows: Tensor, kept: Kept, gap: Gap | None
    ) -> dict[str, float]:
        """One optimizer step on the rows. With ``gap``, it is the rollout's first: its own forward
        gives the old values, and the gap is checked before the step."""
        setup, sums = self.setup, _Sums()
        text_total, image_total = self._totals(data, rows)
        for number, batch in enumerate(
            data.micro_batches(rows, setup.recipe.compute.replay_tokens)
        ):
            points = data.part(batch)
            logps, v = self._forward(data, batch, points, _Wanted())
            if gap is not None:
                self._measure(gap, data, batch, points, logps, v)
                kept.old.put(batch, logps, v)
                if number == 0 and v is not None and points is not None:
                    self._measure_twice(gap, data, batch, points, v)
            loss = torch.zeros((), device=setup.device)
            if logps is not None:
                loss = loss + self._text_loss(data, batch, logps, kept, text_total, sums)
            if v is not None and points is not None:
                loss = loss + self._image_loss(data, batch, points, v, kept, image_total, sums)
            if loss.requires_grad:
                setup.accelerator.backward(loss)
        if gap is not None:
            problems = gap.problems()
            if problems:
                again = partial(self._guided, data)
                raise gap.error(problems, causes(problems, setup, data, kept.old, again))
            check_reached(
                self.experts,
                {
                    "text": data.text_advantages[rows] * setup.recipe.text.weight,
                    "image": data.image_advantages[rows] * setup.recipe.image.weight,
                },
            )
        return {**sums.metrics(), **self._step()}

    def _totals(self, data: TrainSet, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of objective weights over the whole update."""
        text, image = self.setup.text_objective, self.setup.image_objective
        rows = rows.to(data.mask.device)
        zero = torch.zeros((), device=data.mask.device)
        text_total = zero if text is None else text.weights(data.mask[rows]).sum()
        image_total = zero
        if image is not None and data.points is not None:
            image_total = image.weights(torch.ones_like(data.points.t[rows]).bool()).sum()
        return text_total, image_total

    def _measure_twice(
        self, gap: Gap, data: TrainSet, batch: MicroBatch, points: Points, v: Velocity
    ) -> None:
        assert self.setup.image_objective is not None
        again = self._guided(data, batch, points)
        gap.own(self.setup.image_objective, points, v.guided.detach(), again)

    def _text_loss(
        self,
        data: TrainSet,
        batch: MicroBatch,
        logps: Tensor,
        kept: Kept,
        total: Tensor,
        sums: _Sums,
    ) -> Tensor:
        setup, width = self.setup, logps.shape[1]
        assert setup.text_objective is not None
        rows = batch.rows
        mask, old_logps = data.mask[rows, :width], kept.old.logps[rows, :width]
        values, metrics = setup.text_objective.loss(
            logps, old_logps, mask, data.text_advantages[rows]
        )
        weights = setup.text_objective.weights(mask) / total
        term = (values * weights).sum()
        sums.add("text/loss", term)
        for name, value in metrics.items():
            sums.add(f"text/{name}", (value * weights).sum())
        loss = setup.recipe.text.weight * term
        for item in setup.text_regularizers:
            step = TokenStep(logps, kept.anchor(item.anchor).logps[rows, :width], mask)
            penalty = (item.penalty(step) * weights).sum()
            sums.add(f"text/{item.name}", penalty)
            loss = loss + item.weight * penalty
        return loss

    def _image_loss(
        self,
        data: TrainSet,
        batch: MicroBatch,
        points: Points,
        v: Velocity,
        kept: Kept,
        total: Tensor,
        sums: _Sums,
    ) -> Tensor:
        setup, rows, columns = self.setup, batch.rows, batch.columns
        assert setup.image_objective is not None
        assert kept.old.guided is not None
        old_v = kept.old.guided[rows, columns]
        points = replace(points, old_mean=points.transition(old_v).mean)
        velocities = {"current": v.guided, "old": old_v}
        if kept.reference is not None and kept.reference.guided is not None:
            velocities["reference"] = kept.reference.guided[rows, columns]
        values, metrics = setup.image_objective.loss(
            points, velocities, data.image_advantages[rows, columns], data.rewards[rows, columns]
        )
        weights = setup.image_objective.weights(torch.ones_like(points.t).bool()) / total
        term = (values * weights).sum()
        sums.add("image/loss", term)
        for name, value in metrics.items():
            sums.add(f"image/{name}", (value * weights).sum())
        loss = setup.recipe.image.weight * term
        for item in setup.image_regularizers:
            anchor = kept.anchor(item.anchor)
            mine = v.guided if item.on == "transition" else v.conditional
            theirs = anchor.guided if item.on == "transition" else anchor.conditional
            assert theirs is not None
            penalty = (item.penalty(_step(points, mine, theirs[rows, columns])) * weights).sum()
            sums.add(f"image/{item.name}", penalty)
            loss = loss + item.weight * penalty
        return loss

    def _step(self) -> dict[str, float]:
        recipe = self.setup.recipe.optimizer
        warm = min(1.0, (self.updates + 1) / max(1, recipe.warmup_updates))
        found: dict[str, float] = {}
        for expert, parameters in self.experts.items():
            norm = nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
            finite(f"the gradient of the {expert} expert", norm)
            found[f"{expert}/grad_norm"] = float(norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * warm
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return found


def _step(points: Points, v: Tensor, v_anchor: Tensor) -> FlowStep:
    return FlowStep(
        v=v,
        v_anchor=v_anchor,
        x_t=points.x_t,
        t=points.t,
        t_next=points.t_next,
        transition=points.transition(v),
        transition_anchor=points.transition(v_anchor),
    )


class _Sums:
    """Weighted sums over micro-batches, kept as tensors until the end of the update."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach().double()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def metrics(self) -> Mapping[str, float]:
        return {name: float(value) for name, value in self._sums.items()}
