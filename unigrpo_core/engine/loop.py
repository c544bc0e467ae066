"""The training loop: rollout, score, advantage, gap, updates, metrics, evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from unigrpo_core.engine.checks import check_prompts
from unigrpo_core.engine.clock import Clock
from unigrpo_core.engine.cost import Cost, earlier_run
from unigrpo_core.engine.evaluate import evaluate
from unigrpo_core.engine.events import Log, events
from unigrpo_core.engine.experience import gather
from unigrpo_core.engine.faults import told
from unigrpo_core.engine.folder import RunFolder, whole
from unigrpo_core.engine.scoring import equal_groups
from unigrpo_core.engine.setup import Setup, build_setup
from unigrpo_core.engine.sheet import Card, cards, write_sheet
from unigrpo_core.engine.update import Updater
from unigrpo_core.recipe import Resolved
from unigrpo_core.records import ImageSegment, Rollout, TextSegment


class Reporter(Protocol):
    """Whoever shows a run; it can alter nothing."""

    def started(self, resolved: Resolved, folder: Path, setup: Setup) -> None: ...

    def stepped(
        self, step: int, metrics: Mapping[str, float], timing: Mapping[str, float]
    ) -> None: ...

    def evaluated(self, step: int, means: Mapping[str, float]) -> None: ...

    def finished(self, folder: Path, summary: Mapping[str, Any]) -> None: ...


class Run:
    """One run of a recipe in its folder; ``notes`` are what its user should know before.

    Raises:
        UserError: before anything is written, if the folder is taken, a part cannot be built, or
            the prompts are none or not such as the policy takes.
    """

    def __init__(self, resolved: Resolved, path: Path, reporter: Reporter) -> None:
        self.resolved, self.recipe = resolved, resolved.recipe
        self.folder, self.reporter = RunFolder(path), reporter
        self.setup = build_setup(resolved, path)
        with told(self.recipe):
            self.notes = check_prompts(self.setup)
            self.updater = Updater(self.setup)
        self.history: list[tuple[int, dict[str, float]]] = []
        self.shown: dict[int, list[Card]] = {}
        self.step = 0  # the last one that was measured
        self.ended = self.recipe.steps == 0
        self.cost = Cost()
        self.earlier = earlier_run(self.recipe.start)

    def __call__(self) -> dict[str, Any]:
        """Trains, evaluates, and returns the summary that it has written. Whatever ends it before
        bears a note on what its folder keeps."""
        start = time.perf_counter()
        self.folder.create(self.resolved)
        try:
            with events(self.setup.accelerator, self.folder.path) as log:
                self.reporter.started(self.resolved, self.folder.path, self.setup)
                with told(self.recipe):
                    self._train(log)
            with whole(self.folder.path / "final") as partial:
                self.setup.policy.save(partial)
        except BaseException as error:
            error.add_note(f"{self.folder.path} keeps what was measured{self._until()}")
            raise
        summary = self._summary(time.perf_counter() - start)
        self.folder.write("summary.json", summary)
        self.reporter.finished(self.folder.path, summary)
        return summary

    def _until(self) -> str:
        """For the note: how far the run came."""
        return f" up to step {self.step} of {self.recipe.steps}" if self.history else " (nothing)"

    def _train(self, log: Log) -> None:
        recipe, every = self.recipe, self.recipe.evaluation.every
        self._evaluate(0, log)
        for step in range(1, recipe.steps + 1):
            metrics, timing = self._step(step)
            self.cost = self.cost.and_step(metrics, timing)
            self.folder.append("metrics.jsonl", {"step": step, **metrics})
            self.folder.append("timing.jsonl", {"step": step, **timing})
            self.step = step
            log({**metrics, **_prefixed("time", timing)}, step=step)
            self.reporter.stepped(step, metrics, timing)
            self.ended = step == recipe.steps or self.cost.spent(recipe.budget)
            if self.ended or (every and step % every == 0):
                self._evaluate(step, log)
            if self.ended:
                break

    def _step(self, step: int) -> tuple[dict[str, float], dict[str, float]]:
        setup, recipe = self.setup, self.recipe
        clock, start, wall = Clock(setup.device), time.process_time(), time.perf_counter()
        before = self.updater.calls
        found = gather(setup, step, clock)
        rollout, scores = found.sampled.rollout, found.sampled.scores
        totals = scores.total.double().view(len(rollout.prompts), -1)  # a row per prompt
        with clock.phase("update"):
            metrics = self.updater(found.data)
        metrics = {
            "reward": float(totals.mean()),
            "reward_std": float(totals.std(1, correction=min(1, totals.shape[1] - 1)).mean()),
            **equal_groups(recipe, rollout, scores),
            **found.counts,
            **{
                f"reward/{name}": float(values.double().mean())
                for name, values in zip(scores.names, scores.values.T, strict=True)
            },
            **_sizes(rollout),
            **_calls(rollout, clock.calls, self.updater.calls - before),
            **found.cut,
            **metrics,
        }
        timing = {f"{name}_s": seconds for name, seconds in clock.phases.items()}
        timing["wall_s"] = time.perf_counter() - wall
        return metrics, {**timing, "cpu_s": time.process_time() - start}

    def _evaluate(self, step: int, log: Log) -> None:
        recipe = self.recipe
        edge = self.ended or step == 0
        options = recipe.evaluation
        count = options.final_prompts if edge else options.prompts
        main, *others = self.setup.views
        result = evaluate(self.setup, count, main)
        means, cut = result.means(), dict(result.cut)
        for view in others if edge else ():
            further = evaluate(self.setup, count, view)
            means, cut = means | further.means(), {**cut, **further.cut}
        self.history.append((step, means))
        self.folder.append(
            "evaluation.jsonl", {"step": step, "prompts": len(result.batch), **means, **cut}
        )
        log(_prefixed("evaluation", {**means, **cut}), step=step)
        if options.sheet:
            self.shown[step] = cards(result, options.sheet)
            self._sheets(step)
        self.reporter.evaluated(step, {**means, **cut})

    def _sheets(self, step: int) -> None:
        title = f"{self.resolved.name}: held-out prompts"
        folder = self.folder.path / "sheets"
        write_sheet(folder / f"step-{step:05d}.png", title, [(f"step {step}", self.shown[step])])
        if self.ended and step:
            steps = sorted(self.shown)
            middle = [steps[len(steps) // 2]] if len(steps) > 2 else []
            chosen = [0, *middle, step]
            columns = [(f"step {number}", self.shown[number]) for number in chosen]
            write_sheet(folder / "before-after.png", title, columns)

    def _summary(self, seconds: float) -> dict[str, Any]:
        before, after = self.history[0][1], self.history[-1][1]
        return {
            "recipe": self.resolved.name,
            "hash": self.resolved.hash,
            "seed": self.recipe.seed,
            "steps": self.step,
            "before": before,
            "after": after,
            "gain": {name: after[name] - before[name] for name in before if name in after},
            **self.cost.rounded(),
            "earlier": self.earlier.cost,
            "start_hash": self.earlier.hash,
            "wall_s": round(seconds, 2),
            "cpu_s": round(time.process_time(), 2),
        }


def _prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def _calls(rollout: Rollout, sampling: int, training: int) -> dict[str, float]:
    """Velocities computed, each of one image at one time in one context."""
    images = sum(len(s.latents) for s in rollout.segments if isinstance(s, ImageSegment))
    if not images:
        return {}
    return {"network_calls": sampling + training, "calls_per_image": sampling / images}


def _sizes(rollout: Rollout) -> dict[str, float]:
    found: dict[str, float] = {}
    for segment in rollout.segments:
        if isinstance(segment, TextSegment):
            found["tokens"] = int(segment.mask.sum())
            found["thought_length"] = float(segment.mask.sum(1).double().mean())
        elif isinstance(segment, ImageSegment):
            found["images"] = len(segment.latents)
    return found
