"""What every reward keeps: see :class:`unigrpo_core.interfaces.Reward`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from unigrpo_core.interfaces import Reward
from unigrpo_core.recipe.slots import RewardSlot
from unigrpo_core.records import Prompt, RewardBatch
from unigrpo_core.testing.base import Conformance
from unigrpo_core.testing.samples import uniform
from unigrpo_core.testing.watch import no_global_draws, unchanged

PARTS = frozenset({"prompt", "metadata", "thought", "image"})


class RewardConformance(Conformance):
    """Checks of a reward.

    Facts:
        prompts: at least 3 prompts that the reward can judge, with the metadata it reads.
        thoughts: texts in the words that the reward understands.
        image_size: (height, width) of the images it takes.
        tolerance: how far rounding may move a score, absolute and relative.
    """

    slot = RewardSlot
    prompts: ClassVar[Sequence[Prompt]] = tuple(
        Prompt(f"prompt-{row}", text)
        for row, text in enumerate(("a red square", "two green circles", "a cat on a mat", "fog"))
    )
    thoughts: ClassVar[Sequence[str]] = ("a red square in the middle", "first, a circle", "", "x")
    image_size: ClassVar[tuple[int, int]] = (24, 24)
    tolerance: ClassVar[float] = 1e-6

    def batch(self) -> RewardBatch:
        """Eight episodes: images of noise, black, white, grey and dim; every prompt and thought."""
        noise = uniform("reward images", 8, 3, *self.image_size)
        noise[1], noise[2], noise[3], noise[4] = 0.0, 1.0, 0.5, noise[4] / 50
        rows = range(len(noise))
        return RewardBatch(
            prompts=tuple(self.prompts[row % len(self.prompts)] for row in rows),
            thoughts=tuple(self.thoughts[row % len(self.thoughts)] for row in rows),
            images=noise,
            keys=tuple(f"0/1/{self.prompts[row % len(self.prompts)].id}/{row}" for row in rows),
        )

    def score(self, reward: Reward, batch: RewardBatch) -> Tensor:
        """The scores as the engine asks for them: without gradient."""
        with torch.no_grad():
            return reward.score(batch)

    def close(self, got: Tensor, expected: Tensor, said: str) -> None:
        torch.testing.assert_close(
            got,
            expected,
            atol=self.tolerance,
            rtol=self.tolerance,
            msg=lambda text: f"{said}\n{text}",
        )

    # --- what it says -------------------------------------------------------------------------

    def test_declarations(self, component: Reward) -> None:
        """``reads`` names parts of an episode, ``range`` is (low, high), the flags are bools."""
        reads = component.reads
        assert isinstance(reads, frozenset), f"reads is a frozenset, got {reads!r}"
        assert reads <= PARTS, f"reads {sorted(reads - PARTS)}; an episode has {sorted(PARTS)}"
        low, high = component.range
        assert low < high, f"range ({low}, {high}) holds nothing"
        assert isinstance(component.higher_is_better, bool)
        assert isinstance(self.found().differentiable, bool)

    # --- scores -------------------------------------------------------------------------------

    def test_score_is_one_float32_per_episode(self, component: Reward) -> None:
        """float32 [B], for B = 8 and B = 1."""
        for rows in (range(8), range(1)):
            batch = take(self.batch(), rows)
            score = self.score(component, batch)
            assert isinstance(score, Tensor), f"score returned {type(score).__name__}"
            assert score.shape == (len(batch),), f"{tuple(score.shape)}, expected ({len(batch)},)"
            assert score.dtype == torch.float32, f"{score.dtype}, expected torch.float32"

    def test_scores_are_in_range(self, component: Reward) -> None:
        """Finite and within ``range``, also for black, white and noise."""
        self.in_range(component, self.batch())

    def test_empty_thoughts_are_scored(self, component: Reward) -> None:
        """An episode that thinks may have said nothing."""
        batch = self.batch()
        self.in_range(component, replace(batch, thoughts=("",) * len(batch)))

    def in_range(self, reward: Reward, batch: RewardBatch) -> None:
        score = self.score(reward, batch)
        assert torch.isfinite(score).all(), f"not finite: {score.tolist()}"
        low, high = reward.range
        assert (score >= low - 1e-5).all(), f"below {low}: {score.min().item()}"
        assert (score <= high + 1e-5).all(), f"above {high}: {score.max().item()}"

    def test_rows_are_independent(self, component: Reward) -> None:
        """An episode's score is the same alone as among others."""
        batch = self.batch()
        alone = [self.score(component, take(batch, [row])) for row in range(len(batch))]
        self.close(torch.cat(alone), self.score(component, batch), "alone against together:")

    def test_order_does_not_matter(self, component: Reward) -> None:
        """Scores follow their episodes when these change places."""
        batch, order = self.batch(), [5, 0, 7, 2, 1, 6, 4, 3]
        moved = self.score(component, take(batch, order))
        self.close(moved, self.score(component, batch)[order], "in another order:")

    def test_scores_are_repeatable(self, component: Reward, given: Mapping[str, Any]) -> None:
        """The same batch gets the same scores: again, and from a reward built anew."""
        batch = self.batch()
        first = self.score(component, batch)
        assert torch.equal(self.score(component, batch), first), "a second call differs"
        assert torch.equal(self.score(self.build(given), batch), first), "a second build differs"

    def test_nothing_global_is_drawn(self, component: Reward) -> None:
        """The global generators are left alone; draws come from ``batch.keys``."""
        with no_global_draws():
            self.score(component, self.batch())
            component.details(self.batch())

    def test_inputs_are_left_alone(self, component: Reward) -> None:
        """Neither images nor prompts nor metadata change."""
        batch = self.batch()
        with unchanged(batch=batch):
            self.score(component, batch)
            component.details(batch)

    def test_reads_no_more_than_it_says(self, component: Reward) -> None:
        """What ``reads`` does not name may be absent or different, and changes no score."""
        batch = self.batch()
        score = self.score(component, batch)
        for part in sorted(PARTS - component.reads):
            without = self.score(component, deprive(batch, part))
            assert torch.equal(without, score), f"the {part} changes its score: say so in reads"
        poor = batch
        for part in PARTS - component.reads:
            poor = deprive(poor, part)
        assert torch.equal(self.score(component, poor), score)
        component.details(poor)

    # --- gradients ----------------------------------------------------------------------------

    def test_gradient_is_as_declared(self, component: Reward) -> None:
        """If the provider says ``differentiable`` a finite gradient reaches the images, each
        score's its own."""
        if not self.found().differentiable:
            pytest.skip("it does not say that it is differentiable")
        batch = self.batch()
        assert batch.images is not None
        images = batch.images.requires_grad_()
        score = component.score(replace(batch, images=images))
        assert score.requires_grad, "differentiable is True, but no gradient reaches the images"
        (gradient,) = torch.autograd.grad(score[0], images)
        assert torch.isfinite(gradient).all(), "the gradient is not finite"
        assert gradient[0].any(), "the gradient of an image of noise is 0 everywhere"
        assert not gradient[1:].any(), "a score's gradient reaches the images of others"

    # --- details ------------------------------------------------------------------------------

    def test_details_are_further_scores(self, component: Reward) -> None:
        """One finite number per episode under each name, the same alone as among others."""
        batch = self.batch()
        found = component.details(batch)
        assert isinstance(found, Mapping), f"details returned {type(found).__name__}"
        alone = [component.details(take(batch, [row])) for row in range(len(batch))]
        for name, values in found.items():
            assert isinstance(name, str), f"{name!r} is no name"
            assert isinstance(values, Tensor), f"{name}: {type(values).__name__}"
            assert values.shape == (len(batch),), f"{name}: {tuple(values.shape)}"
            assert torch.isfinite(values.float()).all(), f"{name} is not finite"
            self.close(torch.cat([row[name] for row in alone]), values, f"{name}, alone:")


def take(batch: RewardBatch, rows: Sequence[int]) -> RewardBatch:
    """The episodes at these places."""
    assert batch.thoughts is not None
    assert batch.images is not None
    return RewardBatch(
        prompts=tuple(batch.prompts[row] for row in rows),
        thoughts=tuple(batch.thoughts[row] for row in rows),
        images=batch.images[list(rows)],
        keys=tuple(batch.keys[row] for row in rows),
    )


def deprive(batch: RewardBatch, part: str) -> RewardBatch:
    """The batch without a part: None where it can be, else something else."""
    if part == "thought":
        return replace(batch, thoughts=None)
    if part == "image":
        return replace(batch, images=None)
    if part == "prompt":
        prompts = tuple(replace(p, text=f"not {p.text}") for p in batch.prompts)
    else:
        prompts = tuple(replace(p, metadata={}) for p in batch.prompts)
    return replace(batch, prompts=prompts)
