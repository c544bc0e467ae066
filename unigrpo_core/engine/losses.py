"""The losses of a micro-batch.

Total = text.weight x L_text + image.weight x L_image + sum of w_r x R_r, where every L and R is
sum(values x weights) / sum(weights) over the whole update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from unigrpo_core.engine.faults import floats
from unigrpo_core.engine.kept import Kept, Velocity
from unigrpo_core.engine.scoring import graded
from unigrpo_core.engine.setup import Setup
from unigrpo_core.engine.trainset import MicroBatch, TrainSet
from unigrpo_core.recipe.slots import Slot
from unigrpo_core.records import FlowStep, Points, TokenStep


class Losses:
    """The losses of one update on some rows of a training set; a micro-batch at a time."""

    def __init__(self, setup: Setup, data: TrainSet, rows: Tensor, kept: Kept) -> None:
        self.setup, self.data, self.kept = setup, data, kept
        self.text_total, self.image_total = self._totals(rows.to(data.mask.device))
        self._sums = _Sums()

    def __call__(
        self, batch: MicroBatch, points: Points | None, logps: Tensor | None, v: Velocity | None
    ) -> Tensor:
        """The micro-batch's share of the total."""
        loss = torch.zeros((), device=self.setup.device)
        if logps is not None:
            loss = loss + self._text(batch, logps)
        if v is not None and points is not None:
            loss = loss + self._image(batch, points, v)
        return loss

    def metrics(self) -> Mapping[str, float]:
        """Every term and metric of the micro-batches so far."""
        return self._sums.metrics()

    def _totals(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of objective weights over the whole update."""
        data = self.data
        text, image = self.setup.text_objective, self.setup.image_objective
        zero = torch.zeros((), device=data.mask.device)
        text_total = zero if text is None else text.total(data.mask[rows])
        image_total = zero
        if image is not None and data.points is not None:
            image_total = image.weights(torch.ones_like(data.points.t[rows]).bool()).sum()
        return text_total, image_total

    def _text(self, batch: MicroBatch, logps: Tensor) -> Tensor:
        setup, data, kept, sums = self.setup, self.data, self.kept, self._sums
        width = logps.shape[1]
        assert setup.text_objective is not None
        rows = batch.rows
        mask, old_logps = data.mask[rows, :width], kept.old.logps[rows, :width]
        values, metrics = setup.text_objective.loss(
            logps, old_logps, mask, data.text_advantages[rows]
        )
        weights = setup.text_objective.weights(mask)
        _check(setup.recipe.text.objective, values, weights, metrics, mask)
        weights = weights / self.text_total
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

    def _image(self, batch: MicroBatch, points: Points, v: Velocity) -> Tensor:
        setup, data, kept, sums = self.setup, self.data, self.kept, self._sums
        rows, columns = batch.rows, batch.columns
        assert setup.image_objective is not None
        assert kept.old.guided is not None
        old_v = kept.old.guided[rows, columns]
        points = replace(points, old_mean=points.transition(old_v).mean)
        if "score" in setup.image_objective.needs:
            points = replace(points, score=partial(graded, setup, data.told(batch)))
        velocities = {"current": v.guided, "old": old_v}
        for name, values in kept.anchors.items():
            if values.guided is not None:
                velocities[name] = values.guided[rows, columns]
        losses, metrics = setup.image_objective.loss(
            points, velocities, data.image_advantages[rows, columns], data.rewards[rows, columns]
        )
        mask = torch.ones_like(points.t).bool()
        weights = setup.image_objective.weights(mask)
        _check(setup.recipe.image.objective, losses, weights, metrics, mask)
        weights = weights / self.image_total
        term = (losses * weights).sum()
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


def _check(
    objective: Slot | None,
    values: object,
    weights: object,
    metrics: Mapping[str, object],
    mask: Tensor,
) -> None:
    """Whether an objective returned one number per token or point, and says so if not."""
    assert objective is not None
    for what, found in {
        "as loss": values,
        "as weights": weights,
        **{f"as metric {name!r}": value for name, value in metrics.items()},
    }.items():
        floats(objective.who, found, mask.shape, what)


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
