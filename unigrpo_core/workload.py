"""What a step of a recipe amounts to, in plain numbers, and what a policy says that it costs.

The engine's side is a :class:`Workload`: how many rows, images and points there are and how they
are cut into batches. The policy's side is an :class:`Account`, which its provider's ``account``
makes of its options and a workload, without loading anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

PROMPT_TOKENS = 88
"""Tokens of a prompt's context, system prompt included, where the tokenizer is not asked."""

Held = Literal["always", "rollout", "update", "host"]


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes moved to and from the device's memory."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)

    __rmul__ = __mul__

    def seconds(self, peak_flops: float, bandwidth: float) -> float:
        """The roofline's floor, with arithmetic and memory at their peaks (per second) at once."""
        return max(self.flops / peak_flops, self.bytes / bandwidth)


# --- what a step amounts to -------------------------------------------------------------------


@dataclass(frozen=True)
class MicroBatch:
    """Contexts by columns (points under each) of one replay."""

    rows: int
    columns: range


@dataclass(frozen=True)
class Calls:
    """Velocities computed in a training step, each of one image at one time in one context, as a
    run's ``network_calls`` counts them."""

    sampling: float = 0.0
    old: float = 0.0  # old values of the updates after the first
    reference: float = 0.0
    average: float = 0.0  # of the moving average of the weights, where losses compare with it
    update: float = 0.0
    again: float = 0.0  # the first micro-batch, computed twice to see the trainer's own gap
    unguided: float = 0.0  # of those in sampling: in the conditional context
    first_step: float = 0.0  # once more, in a run's first step: does the reference stand still?

    @property
    def total(self) -> float:
        """Of every step but the first."""
        kept = self.old + self.reference + self.average
        return self.sampling + kept + self.update + self.again


@dataclass(frozen=True)
class Workload:
    """One training step of a recipe; evaluation is not in it.

    Args:
        rows: contexts that are trained: thoughts, or prompts where nothing is thought.
        thoughts, images: sampled in a rollout; 0 where there is no such segment.
        fan_out: images of a context.
        max_tokens: of a thought, its end included; every thought is taken to be so long.
        points: trained steps of an image; 0 where no image is trained.
        windows: the stochastic steps of rollouts 1, 2, ... of the run, as they will be drawn.
        shared_noise: whether the images of a context start from the same noise.
        branches: unconditional contexts of a guided step.
        guided: from a timestep shift (None: the recipe's own), which steps are guided.
        train, scored, reference_text, reference_image: what is trained, whether log-probs are
            taken, and which passes the reference makes.
        signal: whether a copy of the gradients is kept now and then.
        checkpointing: what of the activations is kept between forward and backward.
        reference_on: where a copy of the starting weights lies while it is not used.
        fresh: whether the points are the objective's own, at times that are drawn in the update.
        average: whether a moving average of the weights is kept; average_text, average_image:
            which passes it makes as an anchor; average_samples: whether rollouts are by it.
        turns: steps that train the text expert alone and the image expert alone, by turns.
    """

    prompts: int
    rows: int
    thoughts: int
    images: int
    fan_out: int
    max_tokens: int
    prompt_tokens: int
    size: tuple[int, int]
    steps: int
    points: int
    windows: tuple[tuple[int, ...], ...]
    shared_noise: bool
    branches: int
    guided: Callable[[float], Sequence[bool]] = field(repr=False, compare=False)
    updates: int
    disjoint: bool
    train: frozenset[str]
    scored: bool
    reference_text: bool
    reference_image: bool
    context_gradient: bool
    signal: bool
    rollout_rows: int
    rollout_images: int
    replay_tokens: int
    precision: Literal["float32", "bf16"]
    checkpointing: Literal["none", "selective", "full"] = "none"
    reference_on: Literal["device", "host"] = "device"
    fresh: bool = False
    average: bool = False
    average_text: bool = False
    average_image: bool = False
    average_samples: bool = False
    turns: tuple[int, int] | None = None

    @property
    def context(self) -> int:
        """Tokens of a prompt and its thought, which is put between two more."""
        return self.prompt_tokens + (self.max_tokens + 2 if self.thoughts else 0)

    @property
    def columns(self) -> int:
        return self.points * self.fan_out

    @property
    def reference(self) -> bool:
        return self.reference_text or self.reference_image

    @property
    def recorded(self) -> int:
        """How many updates' shares get their old values by a forward of their own: all of them
        where an average sampled, else all after the first."""
        shares = self.updates if self.disjoint else 1
        return shares if self.average_samples else shares - 1

    def trains_image(self, rollout: int) -> bool:
        """Whether the step of a rollout, numbered from 1, trains on the points of its images."""
        text, image = self.turns or (0, 1)
        return (rollout - 1) % (text + image) >= text

    def micro_batches(self, rows: int, image_tokens: int) -> tuple[MicroBatch, ...]:
        """How ``rows`` contexts are cut into replays of at most ``replay_tokens`` tokens, a point
        having ``image_tokens``: as the engine's training set cuts them."""
        budget, longest = self.replay_tokens, self.context
        wide = max(1, min(self.columns, (budget - longest) // max(1, image_tokens)))
        found = []
        for start in range(0, max(1, self.columns), wide):
            stop = min(start + wide, self.columns)
            high = max(1, budget // (longest + (stop - start) * image_tokens))
            found += [
                MicroBatch(min(high, rows - row), range(start, stop))
                for row in range(0, rows, high)
            ]
        return tuple(found)

    def calls(self, image_tokens: int, shift: float) -> tuple[Calls, ...]:
        """Of each of the rollouts that ``windows`` are given for; ``shift`` is the model's own
        timestep shift, which a recipe may overrule."""
        if not self.images:
            return ()
        guided = self.guided(shift)
        kinds = [(w, self.trains_image(rollout)) for rollout, w in enumerate(self.windows, 1)]
        known = {kind: self._calls(*kind, guided, image_tokens) for kind in {*kinds}}
        return tuple(known[kind] for kind in kinds)

    def _calls(
        self, window: Sequence[int], trains: bool, guided: Sequence[bool], image_tokens: int
    ) -> Calls:
        sampling, unguided = self._sampled(window, guided)
        if not trains:
            return Calls(sampling=sampling, unguided=unguided)
        share = self.rows // self.updates if self.disjoint else self.rows

        def cut(rows: int) -> tuple[MicroBatch, ...]:
            return self.micro_batches(rows, image_tokens) if self.points and rows else ()

        def cost(batches: Sequence[MicroBatch]) -> float:
            return sum(b.rows * self._cost(b.columns, window, guided) for b in batches)

        everyone = cut(self.rows)
        anchored = everyone if self.reference_image else ()
        measured = not (self.fresh or self.average_samples)
        return Calls(
            sampling=sampling,
            old=cost(everyone) if self.average_samples else self.recorded * cost(cut(share)),
            reference=cost(anchored),
            average=cost(everyone) if self.average_image else 0.0,
            update=self.updates * cost(cut(share)),
            again=cost(cut(share)[:1]) if measured else 0.0,
            unguided=unguided,
            first_step=cost(cut(anchored[0].rows)) if anchored else 0.0,
        )

    def _cost(self, columns: range, window: Sequence[int], guided: Sequence[bool]) -> int:
        """Velocities of one context's columns: all have the branches if one of them is guided, and
        points at drawn times if any step is."""
        if self.fresh:
            return len(columns) * (1 + self.branches * any(guided))
        active = any(guided[window[column % self.points]] for column in columns)
        return len(columns) * (1 + self.branches * active)

    def _sampled(self, window: Sequence[int], guided: Sequence[bool]) -> tuple[float, float]:
        """Velocities of a rollout, and those of them in the conditional context: images from the
        same noise are one until their first stochastic step."""
        together = (window[0] + 1 if window else self.steps) if self.shared_noise else 0
        costs = [1 + self.branches * on for on in guided]
        lanes = sum(len({*chunk}) for chunk in self._chunks())
        total = lanes * sum(costs[:together]) + self.images * sum(costs[together:])
        return total, lanes * together + self.images * (self.steps - together)

    def _chunks(self) -> list[list[int]]:
        """The contexts of the images that are denoised at once."""
        limit = min(self.rollout_rows, self.rollout_images)
        found = []
        for start in range(0, self.rows, self.rollout_rows):
            held = range(start, min(start + self.rollout_rows, self.rows))
            each = [row for row in held for _ in range(self.fan_out)]
            found += [each[first : first + limit] for first in range(0, len(each), limit)]
        return found


# --- what it costs ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of one part, and when they are held: always, in the rollout or the update only, or
    always but on the host."""

    name: str
    bytes: float
    held: Held = "always"
    note: str = ""


@dataclass(frozen=True)
class Account:
    """What a step of a workload takes on the device.

    Args:
        model: the model that was counted, for the reader.
        memory: parts.
        work: FLOPs and bytes moved, by phase of a training step.
        calls: velocities, of one rollout after the other.
        images: sampled in a rollout.
        assumptions: what was taken for granted, a sentence each.
        image_tokens: of a point in a replay, for a policy whose part this is the account of.
    """

    model: str
    memory: tuple[Memory, ...]
    work: Mapping[str, Work]
    calls: tuple[Calls, ...]
    images: int
    assumptions: tuple[str, ...] = ()
    image_tokens: int = 0

    def peak(self, phase: Literal["rollout", "update"]) -> float:
        """Bytes that a phase holds at once."""
        return sum(part.bytes for part in self.memory if part.held in ("always", phase))

    @property
    def total(self) -> float:
        return max(self.peak("rollout"), self.peak("update"))

    @property
    def host(self) -> float:
        return sum(part.bytes for part in self.memory if part.held == "host")
