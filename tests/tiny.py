"""What the tests of models and engine share: a tiny BAGEL, recipes for it, and test components.

The module is also a plugin (see :func:`catalog`), so that recipes can name its rewards.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from unigrpo_board.make_checkpoint import write_tokenizer
from unigrpo_models.bagel.checkpoint import write_config
from unigrpo_models.bagel.config import BagelConfig, LanguageConfig, Latent
from unigrpo_models.bagel.network import BagelNetwork
from unigrpo_rewards import random_reward

from unigrpo_core.catalog import Catalog, collect, load_catalog
from unigrpo_core.engine.clock import Clock
from unigrpo_core.engine.experience import gather
from unigrpo_core.engine.loop import Run
from unigrpo_core.engine.setup import Setup, build_setup
from unigrpo_core.engine.trainset import TrainSet
from unigrpo_core.interfaces import Reward
from unigrpo_core.plugin import Field, Options, Provider, hookimpl
from unigrpo_core.recipe import Resolved, load_recipe
from unigrpo_core.records import (
    FlowStep,
    ImageSegment,
    Prompt,
    RewardBatch,
    Rollout,
    TextSegment,
    TokenStep,
)

SIZE = (8, 12)  # two rows of three latent tokens: height and width must not be confused

RECIPE = """\
title = "a tiny model"
steps = 2
prompts = 4
group = {{ fan_out = [3, 1] }}
source = {{ use = "board" }}
rewards = [{{ use = "random" }}]
advantage = {{ use = "group_norm" }}
policy = {{ use = "bagel", checkpoint = {checkpoint} }}

[text]
lr = 1e-3
max_tokens = 6
objective = {{ use = "grpo" }}

[image]
lr = 1e-3
size = [{height}, {width}]
objective = {{ use = "flow_grpo", ratio_norm = true }}
scheduler = {{ use = "flow_sde", steps = 4, noise_level = 0.7 }}
window = {{ use = "random", size = 2, range = [0, 3] }}
guidance = {{ use = "none" }}

[evaluation]
every = 1
prompts = 3
final_prompts = 4
sheet = 0
scheduler = {{ use = "ode", steps = 3 }}
guidance = {{ use = "none" }}

[compute]
device = "cpu"
"""


# --- models -----------------------------------------------------------------------------------


def tiny_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A checkpoint of the real class with random weights that are large enough to matter."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    config = BagelConfig(
        llm=LanguageConfig(
            vocab_size=len(vocabulary) + 3,  # rows of the head without a word, as published
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_theta=1e4,
            max_position_embeddings=64,
        ),
        latent=Latent(space="pixels", patch=4, channels=3, max_size=6, time_shift=2.0),
    )
    write_config(folder, config)
    network = BagelNetwork(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "pos_embed" in name:
                continue
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * drawn if "norm" in name else 0.2 * drawn)
    save_file(network.state_dict(), folder / "ema.safetensors")
    return folder


def final_weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "final" / "ema.safetensors")


def is_image(name: str) -> bool:
    """Whether the image expert owns a weight, by the published names."""
    parts = ("_moe_gen", "time_embedder", "vae2llm", "llm2vae")
    return any(part in name for part in parts)


# --- recipes ----------------------------------------------------------------------------------


def catalog() -> Catalog:
    """What is installed, and the components of this module."""
    installed = load_catalog()
    mine = collect([(EntryPoint("tiny", "tiny", "unigrpo"), "tiny-tests", "0.1")])
    return Catalog(installed.components + mine.components, installed.broken + mine.broken)


def recipe_file(folder: Path, checkpoint: Path) -> Path:
    """A file with the recipe above for a checkpoint."""
    file = folder / "tiny.toml"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        height, width = SIZE
        where = json.dumps(str(checkpoint))
        file.write_text(RECIPE.format(checkpoint=where, height=height, width=width))
    return file


def recipe(folder: Path, checkpoint: Path, *overrides: str) -> Resolved:
    """The recipe above for a checkpoint, with ``path=value`` texts laid on."""
    return load_recipe(recipe_file(folder, checkpoint), catalog(), list(overrides))


def setup(folder: Path, checkpoint: Path, *overrides: str) -> Setup:
    return build_setup(recipe(folder, checkpoint, *overrides))


class Silent:
    """A reporter that shows nothing."""

    def started(self, resolved: Resolved, folder: Path, setup: Setup) -> None: ...

    def stepped(
        self, step: int, metrics: Mapping[str, float], timing: Mapping[str, float]
    ) -> None: ...

    def evaluated(self, step: int, means: Mapping[str, float]) -> None: ...

    def finished(self, folder: Path, summary: Mapping[str, Any]) -> None: ...


def run(folder: Path, checkpoint: Path, *overrides: str, name: str = "run") -> Path:
    """Trains; returns the run folder."""
    out = folder / name
    Run(recipe(folder, checkpoint, *overrides), out, Silent())()
    return out


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def prompts(count: int = 3) -> tuple[Prompt, ...]:
    """Prompts of different lengths in the words of the embedded world."""
    texts = (
        "two red circle",
        "half of four green square above a blue circle",
        "one orange neither circle nor square",
        "five minus two mix yellow and blue triangle opposite of left of a red square",
    )
    return tuple(Prompt(f"p{i}", texts[i % len(texts)]) for i in range(count))


# --- float64 ---------------------------------------------------------------------------------


class Float64(TorchFunctionMode):
    """What asks for float32 gets float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


# --- rollouts ---------------------------------------------------------------------------------


def train_set(setup: Setup, step: int = 1) -> TrainSet:
    """The training set of one rollout, as the loop makes it."""
    return gather(setup, step, Clock(setup.device)).data


def text_of(rollout: Rollout) -> TextSegment:
    return next(s for s in rollout.segments if isinstance(s, TextSegment))


def image_of(rollout: Rollout) -> ImageSegment:
    return next(s for s in rollout.segments if isinstance(s, ImageSegment))


def with_segment(rollout: Rollout, **changes: Tensor) -> Rollout:
    """The rollout with fields of its text or image segment replaced, whichever has them."""

    def changed(segment: TextSegment | ImageSegment) -> TextSegment | ImageSegment:
        if all(hasattr(segment, name) for name in changes):
            return replace(segment, **changes)  # type: ignore[arg-type]
        return segment

    return replace(rollout, segments=tuple(changed(s) for s in rollout.segments))


def same_tokens(a: TextSegment, b: TextSegment) -> bool:
    """Whether two text segments have the same sampled tokens, whatever their padding."""
    if a.texts != b.texts:
        return False
    pairs = zip(a.tokens, a.mask, b.tokens, b.mask, strict=True)
    return all(ta[ma].tolist() == tb[mb].tolist() for ta, ma, tb, mb in pairs)


# --- components -------------------------------------------------------------------------------


class WordOptions(Options):
    word: str = Field("red", description="the word that is counted")


class WordReward(Reward):
    """The share of a thought's words that are the word: a reward of text alone."""

    reads: ClassVar[frozenset[str]] = frozenset({"thought"})
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __init__(self, word: str) -> None:
        self.word = word

    def score(self, batch: RewardBatch) -> Tensor:
        shares = [t.split().count(self.word) / max(1, len(t.split())) for t in batch.thoughts]
        return torch.tensor(shares)

    def details(self, batch: RewardBatch) -> Mapping[str, Tensor]:
        return {}


class FaultyOptions(Options):
    fault: Literal["raise", "nan", "length", "range", "list"] = Field(description="what it does")
    after: int = Field(0, description="how many calls are faultless")


class FaultyReward(WordReward):
    """Breaks its interface."""

    def __init__(self, fault: str, after: int) -> None:
        super().__init__("red")
        self.fault, self.after = fault, after

    def score(self, batch: RewardBatch) -> Any:
        good = super().score(batch)
        self.after -= 1
        if self.after >= 0:
            return good
        if self.fault == "raise":
            raise RuntimeError("the judge is down")
        if self.fault == "nan":
            good[-1] = float("nan")
        if self.fault == "range":
            good[0] = 1.5
        if self.fault == "list":
            return good.tolist()
        return good[:-1] if self.fault == "length" else good


class FixedOptions(Options):
    values: tuple[float, ...] = Field(description="the rewards of the episodes, in order, repeated")


class FixedReward(WordReward):
    """Given numbers, whatever was done."""

    range: ClassVar[tuple[float, float]] = (-100.0, 100.0)

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__("red")
        self.values = values

    def score(self, batch: RewardBatch) -> Tensor:
        return torch.tensor([self.values[i % len(self.values)] for i in range(len(batch))])


class SolvedOptions(Options):
    among: int = Field(description="one prompt among so many is open, at random; 0: none")


def solved(options: SolvedOptions):
    """Differs between the episodes of open prompts only."""

    def score(batch: RewardBatch) -> Tensor:
        draws = [zlib.crc32(prompt.id.encode()) for prompt in batch.prompts]
        is_open = [bool(options.among) and draw % options.among == 0 for draw in draws]
        return torch.tensor(is_open) * random_reward.random_score(batch)

    return score


@hookimpl
def unigrpo_rewards():
    yield Provider("solved", solved, SolvedOptions, range=(0.0, 1.0))
    yield Provider("word", lambda options: WordReward(options.word), WordOptions)
    yield Provider("faulty", lambda o: FaultyReward(o.fault, o.after), FaultyOptions)
    yield Provider(
        "first_pixel",
        lambda options: lambda batch: batch.images[:, 0, 0, 0] + 2.0,
        reads=("image",),
        range=(2.0, 3.0),
    )
    yield Provider("fixed", lambda options: FixedReward(options.values), FixedOptions)


class FaultyPenaltyOptions(Options):
    fault: Literal["raise", "mean", "int", "list"] = Field(description="what it does")


def faulty_penalty(options: FaultyPenaltyOptions):
    def penalty(step: FlowStep | TokenStep) -> Any:
        like = step.t if isinstance(step, FlowStep) else step.logps
        if options.fault == "raise":
            raise RuntimeError("not today")
        return {"mean": like.mean(0), "int": like.int(), "list": [0.0]}[options.fault]

    return penalty


@hookimpl
def unigrpo_regularizers():
    yield Provider("faulty_penalty", faulty_penalty, FaultyPenaltyOptions)
