"""Rollouts: from prompts to a forest of segments, without gradient."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from unigrpo_core.engine.clock import Clock
from unigrpo_core.engine.setup import Setup
from unigrpo_core.engine.views import Denoising
from unigrpo_core.interfaces import History, ImageFlowPolicy
from unigrpo_core.keys import Key, normals
from unigrpo_core.recipe.schema import NoiseScope
from unigrpo_core.recipe.schema import Segment as SegmentName
from unigrpo_core.records import ImageSegment, Prompt, Rollout, Sampling, Segment, TextSegment


@dataclass(frozen=True, eq=False)
class Plan:
    """What to sample: the segments, continuations per row, how to denoise, and the stochastic
    steps. ``thoughts`` are read instead of written, one per row, if they are given;
    ``noise_scope`` is the recipe's, if none is given."""

    episode: tuple[SegmentName, ...]
    fan_out: tuple[int, ...]
    denoising: Denoising | None
    trained: tuple[int, ...] = ()
    thoughts: TextSegment | None = None
    noise_scope: NoiseScope | None = None


@torch.no_grad()
def sample(
    setup: Setup, prompts: Sequence[Prompt], plan: Plan, key: Key, clock: Clock | None = None
) -> Rollout:
    """Samples every episode of the prompts. A row's draws come from ``key``, its prompt's id and
    its path in the forest, so they do not depend on how rows are batched."""
    sampler = _Sampler(setup, plan, clock or Clock(setup.device))
    rows = setup.recipe.compute.rollout_rows
    for start in range(0, len(prompts), rows):
        chunk = prompts[start : start + rows]
        keys = [key.child(prompt.id) for prompt in chunk]
        with sampler.clock.phase("text"):
            opened = setup.policy.open(chunk)
        sampler.extend(opened, 0, keys, keys)
    parents, count = [], len(prompts)
    for width in plan.fan_out:
        parents.append(torch.arange(count).repeat_interleave(width))
        count *= width
    segments = tuple(join(parts) for parts in sampler.found)
    return Rollout(tuple(prompts), segments, tuple(parents))


class _Sampler:
    """Goes down the forest depth first, a chunk of rows at a time."""

    def __init__(self, setup: Setup, plan: Plan, clock: Clock) -> None:
        self.setup = setup
        self.plan = plan
        self.clock = clock
        self.noise_scope = plan.noise_scope or setup.recipe.image.noise_scope
        self.found: list[list[Segment]] = [[] for _ in plan.fan_out]

    def extend(
        self, history: History, level: int, keys: Sequence[Key], roots: Sequence[Key]
    ) -> None:
        """Continues rows with keys ``keys``, whose prompts have the keys ``roots``."""
        if level == len(self.plan.fan_out):
            return
        recipe, width = self.setup.recipe, self.plan.fan_out[level]
        parents = torch.arange(len(history)).repeat_interleave(width)
        names = [keys[row].child(i % width) for i, row in enumerate(parents.tolist())]
        limit, think = recipe.compute.rollout_rows, self.plan.episode[level] == "think"
        if not think:
            limit = min(limit, recipe.compute.rollout_images or limit)
        for start in range(0, len(parents), limit):
            chunk = parents[start : start + limit]
            mine = names[start : start + limit]
            tops = [roots[row] for row in chunk.tolist()]
            if think:
                with self.clock.phase("text"):
                    written, longer = self.think(history.rows(chunk), level, mine)
                self.found[level].append(written)
                self.extend(longer, level + 1, mine, tops)
            else:
                above = [keys[row] for row in chunk.tolist()]
                scopes = {"episode": mine, "thought": above, "prompt": tops}
                noise = [k.child("noise") for k in scopes[self.noise_scope]]
                with self.clock.phase("image"):
                    self.found[level].append(self.draw(history, chunk, noise, mine))

    def think(
        self, history: History, level: int, keys: Sequence[Key]
    ) -> tuple[TextSegment, History]:
        """One thought per row of ``history``, written or read, and the history with it."""
        policy, given = self.setup.text_policy, self.plan.thoughts
        if given is None:
            text = self.setup.recipe.text
            return policy.write(history, Sampling(text.max_tokens, text.temperature), keys)
        done = sum(len(part.texts) for part in self.found[level] if isinstance(part, TextSegment))
        written = given.rows(torch.arange(done, done + len(history)))
        return written, policy.append(history, written)

    def draw(
        self, history: History, parents: Tensor, noise: Sequence[Key], keys: Sequence[Key]
    ) -> ImageSegment:
        """Denoises one image per entry of ``parents`` (rows of ``history``).

        Where siblings share their initial noise they are one lane until the first stochastic
        step, whose velocity they still share; only its noise sets them apart.
        """
        setup, plan, trained = self.setup, self.plan.denoising, self.plan.trained
        assert plan is not None
        policy, device = setup.image_policy, setup.device
        size, shape = setup.recipe.image.size, policy.latent_shape(setup.recipe.image.size)
        lanes = _Lanes(parents, shared=self.noise_scope != "episode")
        with ThreadPoolExecutor(1) as ahead:  # draws are ready when the device wants them
            start = ahead.submit(normals, [noise[row] for row in lanes.first], shape, device)
            draws = {
                step: ahead.submit(normals, [k.child("step", step) for k in keys], shape, device)
                for step in trained
            }
            x, stored = start.result(), _Trajectory(len(parents), shape, device)
            guide = _Guide(policy, plan, history.rows(parents[lanes.first]), self.clock)
            for step, (now, then) in enumerate(pairwise(plan.times)):
                level = plan.noise_level if step in trained else 0.0
                times = tuple(
                    torch.full((len(x), 1), at, device=device) for at in (now, then, level)
                )
                v = guide.velocity(x, times[0])
                transition = plan.scheduler.transition(v[:, None], x[:, None], *times)
                mean, std = transition.mean[:, 0], transition.std[:, 0]
                if step not in trained:
                    x = mean
                    continue
                if lanes.shared:
                    x, mean, std, *rest = lanes.split(x, mean, std.expand_as(mean), *times)
                    times = tuple(rest)
                    guide = _Guide(policy, plan, history.rows(parents), self.clock)
                x_next = mean + std * draws[step].result()
                stored.add(x, x_next, mean, *times)
                x = x_next
        (x,) = lanes.split(x)
        return stored.segment(x, policy.decode(x, size).clone())


class _Lanes:
    """Which images are still one: those of a parent, if they start from the same noise."""

    def __init__(self, parents: Tensor, *, shared: bool) -> None:
        rows = parents if shared else torch.arange(len(parents))
        _, self.lane = torch.unique_consecutive(rows, return_inverse=True)
        starts = self.lane.diff(prepend=torch.tensor([-1])).nonzero()[:, 0]
        self.first: list[int] = starts.tolist()  # an image of each lane
        self.shared = len(self.first) < len(parents)

    def split(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The values of every lane [lanes, ...] as those of every image, from now on apart."""
        if not self.shared:
            return values
        self.shared = False
        return tuple(value[self.lane.to(value.device)] for value in values)


class _Trajectory:
    """What is stored at the stochastic steps."""

    names = ("x_t", "x_next", "old_mean", "t", "t_next", "noise_level")

    def __init__(self, rows: int, shape: tuple[int, ...], device: torch.device) -> None:
        latents, column = torch.zeros(rows, 0, *shape), torch.zeros(rows, 0)
        empty = (*(latents,) * 3, *(column,) * 3)
        self.stored = {n: [x.to(device)] for n, x in zip(self.names, empty, strict=True)}

    def add(self, x: Tensor, x_next: Tensor, mean: Tensor, *times: Tensor) -> None:
        """Latents [B, *], and t, t_next and noise level [B, 1]."""
        for name, value in zip(self.names, (x, x_next, mean), strict=False):
            self.stored[name].append(value[:, None])
        for name, value in zip(self.names[3:], times, strict=True):
            self.stored[name].append(value)

    def segment(self, latents: Tensor, images: Tensor) -> ImageSegment:
        joined = {name: torch.cat(values, 1) for name, values in self.stored.items()}
        return ImageSegment(**joined, latents=latents, images=images)


class _Guide:
    """Velocities over a history, guided where guidance is active; the clock counts them."""

    def __init__(
        self, policy: ImageFlowPolicy, plan: Denoising, history: History, clock: Clock
    ) -> None:
        self.policy, self.guidance, self.history = policy, plan.guidance, history
        self.clock = clock
        self.branches = policy.branches(history, plan.guidance.branches)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """[B, *] for x [B, *] and t [B, 1]."""
        v = self.policy.velocity(self.history, x, t[:, 0])
        self.clock.calls += len(x)
        if not self.branches or not bool(self.guidance.active(t).any()):
            return v
        others = {
            name: self.policy.velocity(history, x, t[:, 0])[:, None]
            for name, history in self.branches.items()
        }
        self.clock.calls += len(x) * len(others)
        return self.guidance.combine(v[:, None], others, t)[:, 0]


def rows_of(segment: Segment, rows: Tensor) -> Segment:
    """The rows (int64 [E'] on the CPU) of a segment."""
    if isinstance(segment, TextSegment):
        return segment.rows(rows)
    rows = rows.to(segment.x_t.device)
    return ImageSegment(**{f.name: getattr(segment, f.name)[rows] for f in fields(segment)})


def join(parts: Sequence[Segment]) -> Segment:
    """One segment of several chunks of rows, texts padded to the longest."""
    first = parts[0]
    if isinstance(first, ImageSegment):
        return ImageSegment(
            **{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(first)}
        )
    texts = [part for part in parts if isinstance(part, TextSegment)]
    width = max(part.tokens.shape[1] for part in texts)

    def join(name: str) -> Tensor:
        rows = [getattr(part, name) for part in texts]
        return torch.cat([F.pad(row, (0, width - row.shape[1])) for row in rows])

    words = tuple(text for part in texts for text in part.texts)
    return TextSegment(join("tokens"), join("mask"), join("logps"), words)
