"""A rollout made ready for replay: contexts, points, advantages, and their micro-batches.

A *context* is a prompt with its thought (or a prompt alone); under it lie the points of all images
drawn there, side by side as columns. A micro-batch is some contexts by a range of columns: a
subtree too large for the token budget is split by columns, its context is computed again for each
range, and its text counts in the first range only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unigrpo_core.engine.setup import Setup
from unigrpo_core.keys import Key
from unigrpo_core.recipe.schema import EXPERTS, Expert
from unigrpo_core.records import ImageSegment, Points, Prompt, ReplayBatch, Rollout, TextSegment


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Rows (contexts) by columns (points) of a training set."""

    rows: Tensor  # int64 [B]
    columns: slice
    counts_text: bool


@dataclass(frozen=True, eq=False)
class TrainSet:
    """B contexts with L tokens and K columns each (0 where there are none)."""

    prompts: tuple[Prompt, ...]
    owner: Tensor  # int64 [B], the row of the rollout's prompt
    tokens: Tensor  # int64 [B, L]
    mask: Tensor  # bool [B, L]
    logps: Tensor  # float32 [B, L], the sampler's
    text_advantages: Tensor  # float32 [B]
    points: Points | None  # [B, K, *]
    image_advantages: Tensor  # float32 [B, K]
    rewards: Tensor  # float32 [B, K]
    sizes: tuple[int, ...]  # tokens of each context
    image_tokens: int  # tokens of one point
    thoughts: tuple[str, ...]  # B of them, or none
    train: frozenset[Expert]  # the experts that are trained on it

    @property
    def columns(self) -> int:
        return 0 if self.points is None else self.points.x_t.shape[1]

    def micro_batches(self, rows: Tensor, budget: int) -> Iterator[MicroBatch]:
        """The rows, cut into micro-batches of at most ``budget`` tokens (one point of one context
        at least)."""
        longest = max(self.sizes[row] for row in rows.tolist())
        wide = max(1, min(self.columns, (budget - longest) // max(1, self.image_tokens)))
        for start in range(0, max(1, self.columns), wide):
            stop = min(start + wide, self.columns)
            high = max(1, budget // (longest + (stop - start) * self.image_tokens))
            for chunk in torch.split(rows, high):
                yield MicroBatch(chunk, slice(start, stop), counts_text=start == 0)

    def told(self, batch: MicroBatch) -> tuple[tuple[Prompt, ...], tuple[str, ...] | None]:
        """The prompts and the thoughts of a micro-batch's rows; None if nothing is thought."""
        rows = batch.rows.tolist()
        thoughts = tuple(self.thoughts[row] for row in rows) if self.thoughts else None
        return tuple(self.prompts[row] for row in rows), thoughts

    def part(self, batch: MicroBatch) -> Points | None:
        """The points of a micro-batch."""
        if self.points is None:
            return None
        rows = batch.rows.to(self.points.x_t.device)
        return self.points.map(lambda value: value[rows, batch.columns])

    def replay_batch(
        self, setup: Setup, batch: MicroBatch, points: Points | None, *, want_logps: bool
    ) -> ReplayBatch:
        """What the policy's root is asked for a micro-batch."""
        rows = batch.rows.to(self.tokens.device)
        mask = self.mask[rows]
        width = int(mask.sum(1).max()) if mask.numel() else 0
        prompts, thoughts = self.told(batch)
        return ReplayBatch(
            prompts=prompts,
            tokens=self.tokens[rows, :width],
            mask=mask[:, :width],
            temperature=setup.recipe.text.temperature,
            want_logps=want_logps,
            x_t=None if points is None else points.x_t,
            t=None if points is None else points.t,
            branches=_branches(setup, points),
            context_gradient=setup.recipe.image.context_gradient,
            thoughts=thoughts or (),
        )


def _branches(setup: Setup, points: Points | None) -> tuple[str, ...]:
    """The unconditional contexts that guidance needs at these points."""
    if points is None or setup.training is None:
        return ()
    guidance = setup.training.guidance
    return guidance.branches if bool(guidance.active(points.t).any()) else ()


def build_train_set(
    setup: Setup, rollout: Rollout, advantages: tuple[Tensor | None, ...], total: Tensor, key: Key
) -> TrainSet:
    """The training set of a rollout; ``advantages`` are per segment (None where not trained),
    ``total`` float32 [E] the episodes' rewards, ``key`` for objectives that draw."""
    device = setup.device
    text = image = None
    for level, segment in enumerate(rollout.segments):
        if isinstance(segment, TextSegment):
            text = level
        else:
            image = level
    owner = torch.arange(len(rollout.prompts)) if text is None else rollout.ancestors(text, -1)
    count, thoughts = len(owner), tuple[str, ...]()
    if text is None:
        tokens = torch.zeros(count, 0, dtype=torch.int64, device=device)
        mask, logps = tokens.bool(), tokens.float()
    else:
        written = rollout.segments[text]
        assert isinstance(written, TextSegment)
        tokens, mask, logps = written.tokens, written.mask, written.logps
        thoughts = written.texts
    text_advantages = None if text is None else advantages[text]
    prompts = tuple(rollout.prompts[row] for row in owner.tolist())
    lengths = mask.sum(1).tolist()
    sizes = tuple(
        setup.policy.prompt_tokens(prompt) + (length + 2 if text is not None else 0)
        for prompt, length in zip(prompts, lengths, strict=True)
    )
    points, image_advantages, rewards, image_tokens = None, None, None, 0
    if (
        image is not None
        and advantages[image] is not None
        and setup.image_objective is not None
        and setup.training is not None
    ):
        drawn = rollout.segments[image]
        assert isinstance(drawn, ImageSegment)
        above = rollout.ancestors(image, -1).tolist()
        each = len(above) // len(rollout.prompts)
        points_of = key.child("points")
        keys = [
            points_of.child(rollout.prompts[prompt].id, row % each)
            for row, prompt in enumerate(above)
        ]
        points = _fold(setup.image_objective.points(drawn, setup.training.scheduler, keys), count)
        per_image = points.x_t.shape[1] * count // len(drawn.latents)
        image_advantages = _spread(advantages[image], per_image, count)
        rewards = _spread(total, per_image, count)
        image_tokens = setup.image_policy.image_tokens(setup.recipe.image.size)
    nothing = torch.zeros(count, 0)
    trained = {"text": text_advantages, "image": image_advantages}
    return TrainSet(
        prompts=prompts,
        owner=owner,
        tokens=tokens,
        mask=mask,
        logps=logps,
        text_advantages=(torch.zeros(count) if text_advantages is None else text_advantages).to(
            device
        ),
        points=points,
        image_advantages=(nothing if image_advantages is None else image_advantages).to(device),
        rewards=(nothing if rewards is None else rewards).to(device),
        sizes=sizes,
        image_tokens=image_tokens,
        thoughts=thoughts,
        train=frozenset(expert for expert in EXPERTS if trained[expert] is not None),
    )


def _fold(points: Points, contexts: int) -> Points:
    """Points [E, K, *] of images as columns under their contexts: [B, E / B * K, *]."""

    def fold(value: Tensor) -> Tensor:
        return value.reshape(contexts, -1, *value.shape[2:])

    return points.map(fold)


def _spread(values: Tensor | None, per_image: int, contexts: int) -> Tensor:
    """Values [E] of images, repeated for each of their points: [B, K]."""
    assert values is not None
    return values.repeat_interleave(per_image).view(contexts, -1)
