"""Rollouts: from prompts to a forest of segments, without gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from unigrpo_core.engine.clock import Clock
from unigrpo_core.engine.setup import Denoising, Setup
from unigrpo_core.interfaces import History, ImageFlowPolicy
from unigrpo_core.keys import Key, normals
from unigrpo_core.records import ImageSegment, Prompt, Rollout, Sampling, Segment, TextSegment


@dataclass(frozen=True, eq=False)
class Plan:
    """What to sample: continuations per row, how to denoise, and the stochastic steps."""

    fan_out: tuple[int, ...]
    denoising: Denoising | None
    trained: tuple[int, ...] = ()


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
    segments = tuple(_join(parts) for parts in sampler.found)
    return Rollout(tuple(prompts), segments, tuple(parents))


class _Sampler:
    """Goes down the forest depth first, a chunk of rows at a time."""

    def __init__(self, setup: Setup, plan: Plan, clock: Clock) -> None:
        self.setup = setup
        self.plan = plan
        self.clock = clock
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
        limit = recipe.compute.rollout_rows
        for start in range(0, len(parents), limit):
            chunk = parents[start : start + limit]
            mine = names[start : start + limit]
            tops = [roots[row] for row in chunk.tolist()]
            if recipe.episode[level] == "think":
                policy = self.setup.text_policy
                sampling = Sampling(recipe.text.max_tokens, recipe.text.temperature)
                with self.clock.phase("text"):
                    written, longer = policy.write(history.rows(chunk), sampling, mine)
                self.found[level].append(written)
                self.extend(longer, level + 1, mine, tops)
            else:
                above = [keys[row] for row in chunk.tolist()]
                scopes = {"episode": mine, "thought": above, "prompt": tops}
                noise = [k.child("noise") for k in scopes[recipe.image.noise_scope]]
                with self.clock.phase("image"):
                    self.found[level].append(self.draw(history, chunk, noise, mine))

    def draw(
        self, history: History, parents: Tensor, noise: Sequence[Key], keys: Sequence[Key]
    ) -> ImageSegment:
        """Denoises one image per entry of ``parents`` (rows of ``history``).

        Where siblings share their initial noise they are one lane until the first stochastic
        step, whose velocity they still share; only its noise sets them apart.
        """
        setup, plan = self.setup, self.plan.denoising
        policy = setup.image_policy
        assert plan is not None
        size, device = setup.recipe.image.size, setup.device
        shape = policy.latent_shape(size)
        lanes, lane_of = torch.arange(len(parents)), torch.arange(len(parents))
        if setup.recipe.image.noise_scope != "episode":
            values, lane_of = torch.unique_consecutive(parents, return_inverse=True)
            lanes = torch.searchsorted(parents, values)
        shared = len(lanes) < len(parents)
        context = history.rows(parents[lanes])
        x = normals([noise[i] for i in lanes.tolist()], shape, device)
        guide = _Guide(policy, plan, context)
        stored: dict[str, list[Tensor]] = {name: [] for name in STORED}
        for step in range(plan.steps):
            now, then = plan.times[step], plan.times[step + 1]
            level = plan.noise_level if step in self.plan.trained else 0.0
            t, t_next, noise_level = (
                torch.full((len(x), 1), value, device=device) for value in (now, then, level)
            )
            v = guide.velocity(x, t)
            transition = plan.scheduler.transition(v[:, None], x[:, None], t, t_next, noise_level)
            mean, std = transition.mean[:, 0], transition.std[:, 0]
            if step not in self.plan.trained:
                x = mean
                continue
            if shared:
                spread = lane_of.to(device)
                x, mean, std = x[spread], mean[spread], std.expand(len(x), *std.shape[1:])[spread]
                t, t_next, noise_level = t[spread], t_next[spread], noise_level[spread]
                guide = _Guide(policy, plan, history.rows(parents))
                shared = False
            drawn = normals([key.child("step", step) for key in keys], shape, device)
            x_next = mean + std * drawn
            for name, value in zip(STORED, (x, x_next, mean), strict=True):
                stored[name].append(value)
            for name, value in (("t", t), ("t_next", t_next), ("noise_level", noise_level)):
                stored.setdefault(name, []).append(value[:, 0])
            x = x_next
        if shared:
            x = x[lane_of.to(device)]
        blank = torch.zeros(len(parents), 0, *shape, device=device)
        columns = torch.zeros(len(parents), 0, device=device)
        kept = {
            name: torch.stack(stored[name], 1)
            if stored.get(name)
            else (blank if name in STORED else columns)
            for name in (*STORED, "t", "t_next", "noise_level")
        }
        return ImageSegment(**kept, latents=x, images=policy.decode(x, size).clone())


STORED = ("x_t", "x_next", "old_mean")


class _Guide:
    """Velocities over a history, guided where guidance is active."""

    def __init__(self, policy: ImageFlowPolicy, plan: Denoising, history: History) -> None:
        self.policy, self.guidance, self.history = policy, plan.guidance, history
        self.branches = policy.branches(history, plan.guidance.branches)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """[B, *] for x [B, *] and t [B, 1]."""
        v = self.policy.velocity(self.history, x, t[:, 0])
        if not self.branches or not bool(self.guidance.active(t).any()):
            return v
        others = {
            name: self.policy.velocity(history, x, t[:, 0])[:, None]
            for name, history in self.branches.items()
        }
        return self.guidance.combine(v[:, None], others, t)[:, 0]


def _join(parts: Sequence[Segment]) -> Segment:
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
