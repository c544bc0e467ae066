"""Remakes the embedded checkpoint: ``python -m unigrpo_board.make_checkpoint FOLDER``.

A miniature BAGEL learns to write the thought for a prompt and to draw what a thought lists, on
training compositions only. It follows the official recipe: weights N(0, .02), the image expert a
copy of the text expert, llm2vae zero; cross-entropy plus a velocity error weighted by t^2; a tenth
of the image rows without condition, so that guidance has something to contrast with.

The base is imperfect by its data, in both experts, so that reinforcement has something to find:
thoughts list wrong scenes at a fixed rate, and images miss or replace an object of the thought once
drawing has bound to thinking. The phases go by measured faithfulness, not by the clock, because the
moment when images begin to follow thoughts varies by a factor of two with the seed:

1. bind: constant learning rate, thoughts corrupted, images faithful, until held-out images follow
   their thoughts with a faithfulness of ``BOUND``;
2. blur: images corrupted too, learning rate falling to a twentieth, for ``BLUR_STEPS`` steps.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from unigrpo_models.bagel.checkpoint import write_config
from unigrpo_models.bagel.config import BagelConfig, LanguageConfig, Latent
from unigrpo_models.bagel.history import empty_history
from unigrpo_models.bagel.latents import patchify, unpatchify
from unigrpo_models.bagel.layout import SPECIAL
from unigrpo_models.bagel.network import BagelNetwork
from unigrpo_models.bagel.policy import BagelPolicy
from unigrpo_models.bagel.replay import image_velocity
from unigrpo_models.bagel.tokens import Codec, pad

from unigrpo_board.scene import (
    COLOURS,
    OPPOSITE,
    SHAPES,
    WORDS,
    Placed,
    Scene,
    draw_scene,
    lay_out,
    say,
    think,
)
from unigrpo_board.verifier import SIDE, draw, faithfulness, grid, read
from unigrpo_core.keys import Key
from unigrpo_core.plugin import Placement
from unigrpo_core.records import Prompt, Replay, ReplayBatch

BATCH = 32
RATE = 4e-3
WARMUP = 50
WRONG_THOUGHTS = 0.3
WRONG_IMAGES = 0.35
UNCONDITIONAL = 0.1
IMAGE_WEIGHT = 3.0
BOUND = 0.85
BIND_LIMIT = 2500
BLUR_STEPS = 600
PROBE = 50  # steps between two measurements of faithfulness
DENOISING = 8
SPECIALS = ["<|unk|>", *SPECIAL.values()]
CONFIG = BagelConfig(
    llm=LanguageConfig(
        vocab_size=len(SPECIALS) + len(WORDS),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        max_position_embeddings=64,
    ),
    latent=Latent(space="pixels", patch=4, channels=3, max_size=6, time_shift=2.0),
)
PLACE = Placement(torch.device("cpu"), torch.float32, frozenset({"text", "image"}))


@dataclass(frozen=True)
class Example:
    """A training row: prompt, thought, and the template grid of the image."""

    prompt: str
    thought: str
    cells: np.ndarray


def example(rng: np.random.Generator, *, wrong_thoughts: float, wrong_images: float) -> Example:
    """One row of training compositions; the image follows the thought, right or wrong."""
    scene = draw_scene(rng, lambda scene: scene.trained)
    shown = misread(scene, rng) if rng.random() < wrong_thoughts else scene
    objects = lay_out(shown, rng)
    drawn = spoil(objects, rng) if rng.random() < wrong_images else objects
    return Example(say(scene, rng), think(objects), grid(drawn))


def misread(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene as a careless reader takes it: one or two of count, colour, shape and relation
    are wrong (never so that both kinds become one, which no relation could hold for)."""
    count, (colour, shape), relation = scene.count, scene.kind, scene.relation
    slips = rng.permutation(4)[: int(rng.integers(1, 3))]
    if 0 in slips:
        count = int(rng.choice([n for n in (1, 2, 3) if n != count]))
    if 1 in slips:
        colour = str(rng.choice([c for c in COLOURS if c != colour]))
    if 2 in slips:
        shape = str(rng.choice([s for s in SHAPES if s != shape]))
    if 3 in slips and relation is not None:
        relation = str(rng.choice([r for r in OPPOSITE if r != relation]))
    wrong = Scene(count, (colour, shape), relation, scene.other)
    return misread(scene, rng) if wrong.kind == wrong.other else wrong


def spoil(objects: list[Placed], rng: np.random.Generator) -> list[Placed]:
    """The objects with one of them dropped, recoloured or reshaped (perhaps to what it was)."""
    chosen = int(rng.integers(len(objects)))
    item = objects[chosen]
    kept = objects[:chosen] + objects[chosen + 1 :]
    form = rng.integers(3)
    if form == 0:
        return kept
    if form == 1:
        return [*kept, Placed(str(rng.choice(COLOURS)), item.shape, item.cell)]
    return [*kept, Placed(item.colour, str(rng.choice(SHAPES)), item.cell)]


def fresh_network(generator: torch.Generator) -> BagelNetwork:
    """The official initialisation."""
    network = BagelNetwork(CONFIG)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "pos_embed" in name or "norm" in name:
                continue
            if name.endswith("bias") or name.startswith("llm2vae"):
                parameter.zero_()
            else:
                parameter.normal_(0, 0.02, generator=generator)
        state = dict(network.named_parameters())
        for name, parameter in state.items():
            if "_moe_gen" in name:
                parameter.copy_(state[name.replace("_moe_gen", "")])
    return network


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words, in the files that transformers reads."""
    vocab = {word: number for number, word in enumerate([*SPECIALS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=SPECIALS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make: Any = PreTrainedTokenizerFast
    fast = make(
        tokenizer_object=tokenizer,
        unk_token=SPECIALS[0],
        bos_token=SPECIAL["bos"],
        eos_token=SPECIAL["eos"],
        additional_special_tokens=SPECIALS[3:],
    )
    fast.save_pretrained(folder)


def images_of(rows: list[Example]) -> Tensor:
    """Clean latents [B, h, w, token]."""
    pixels = torch.from_numpy(draw(np.stack([row.cells for row in rows])))
    return patchify(CONFIG.latent, pixels * 2 - 1)


def training_loss(policy: BagelPolicy, rows: list[Example], rng: np.random.Generator) -> Tensor:
    """Cross-entropy of the thoughts, plus the weighted velocity error of the images."""
    data = images_of(rows)
    noise = torch.from_numpy(rng.standard_normal(data.shape, dtype=np.float32))
    u = torch.sigmoid(torch.from_numpy(rng.standard_normal(len(rows), dtype=np.float32)))
    shift = CONFIG.latent.time_shift
    t = shift * u / (1 + (shift - 1) * u)
    at = t.view(-1, 1, 1, 1)
    x_t = (1 - at) * data + at * noise
    codec = policy.codec
    thoughts = [codec.wrap(row.thought)[1:] for row in rows]
    tokens = pad(thoughts, codec.eos, PLACE.device)
    lengths = torch.tensor([len(thought) for thought in thoughts])
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    replay: Replay = policy.root(
        ReplayBatch(
            prompts=tuple(Prompt(str(i), row.prompt) for i, row in enumerate(rows)),
            tokens=tokens,
            mask=mask,
            temperature=1.0,
            want_logps=True,
            x_t=x_t[:, None],
            t=t[:, None],
            branches=(),
            context_gradient=True,
        )
    )
    assert replay.velocities is not None
    velocity = replay.velocities[:, 0]
    free = max(1, round(UNCONDITIONAL * len(rows)))
    nothing = empty_history(CONFIG.llm, free, PLACE.device)
    unconditional = image_velocity(
        policy.network, codec, x_t[:free], t[:free], list(nothing.caches), list(nothing.lengths)
    )
    velocity = torch.cat((unconditional, velocity[free:]))
    error = (velocity - (noise - data)).square().flatten(1).mean(1)
    cross_entropy = -replay.logps.sum() / mask.sum()
    loss: Tensor = cross_entropy + IMAGE_WEIGHT * (t.square() * error).mean()
    return loss


def follow(policy: BagelPolicy, count: int = 96) -> tuple[float, float]:
    """Faithfulness and quality of images drawn under given, correct thoughts of scenes that are not
    trained."""
    rng = Key(("board", "probe")).generator()
    scenes = [draw_scene(rng, lambda scene: not scene.trained) for _ in range(count)]
    thoughts = [think(lay_out(scene, rng)) for scene in scenes]
    codec = policy.codec
    rows = [codec.wrap(say(s, rng)) + codec.wrap(t) for s, t in zip(scenes, thoughts, strict=True)]
    with torch.inference_mode():
        _, caches = policy.network.text(pad(rows, codec.eos, PLACE.device))
        x = torch.from_numpy(rng.standard_normal((count, 6, 6, 48), dtype=np.float32))
        times = np.linspace(1, 0, DENOISING + 1)
        times = CONFIG.latent.time_shift * times / (1 + (CONFIG.latent.time_shift - 1) * times)
        lengths = [len(row) for row in rows]
        for now, then in pairwise(times.tolist()):
            at = torch.full((count,), now)
            v = image_velocity(policy.network, codec, x, at, caches, lengths)
            x = x + v * (then - now)
        pixels = (unpatchify(CONFIG.latent, x) * 0.5 + 0.5).clamp(0, 1)
    readings = read(pixels)
    faithful = [faithfulness(t, reading) for t, reading in zip(thoughts, readings, strict=True)]
    return float(np.mean(faithful)), float(np.mean([reading.quality for reading in readings]))


def train(folder: Path, seed: int) -> dict[str, float]:
    """Writes the checkpoint and returns what was measured.

    Raises:
        RuntimeError: drawing did not bind to thinking within ``BIND_LIMIT`` steps.
    """
    write_config(folder, CONFIG)
    write_tokenizer(folder)
    network = fresh_network(torch.Generator().manual_seed(seed))
    llm = CONFIG.llm
    codec = Codec.read(folder, llm.vocab_size, llm.max_position_embeddings, "")
    policy = BagelPolicy(network, codec, folder, PLACE)
    trained = [p for owned in policy.parameters().values() for p in owned.values()]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    step, bound, faithful = 0, None, 0.0
    while bound is None or step < bound + BLUR_STEPS:
        if bound is None:
            rate, wrong_images = RATE * min(1.0, (step + 1) / WARMUP), 0.0
        else:
            rate = RATE * (1 - 0.95 * (step - bound) / BLUR_STEPS)
            wrong_images = WRONG_IMAGES
        for group in optimizer.param_groups:
            group["lr"] = rate
        rng = Key((seed, "board", "base", step)).generator()
        rows = [
            example(rng, wrong_thoughts=WRONG_THOUGHTS, wrong_images=wrong_images)
            for _ in range(BATCH)
        ]
        loss = training_loss(policy, rows, rng)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        if step % PROBE == 0:
            faithful, quality = follow(policy)
            print(
                f"step {step:5d}  loss {loss.item():.3f}  faithfulness {faithful:.3f}  "
                f"quality {quality:.3f}  cpu {time.process_time():.0f} s",
                flush=True,
            )
            if bound is None and faithful >= BOUND:
                bound = step
            if bound is None and step >= BIND_LIMIT:
                raise RuntimeError(f"faithfulness {faithful:.2f} after {step} steps, seed {seed}")
    policy.save(folder)
    assert bound is not None
    return {"steps": step, "bound_at": bound, "faithfulness_of_true_thoughts": round(faithful, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measured = train(arguments.folder, arguments.seed)
    digest = sha256((arguments.folder / "ema.safetensors").read_bytes()).hexdigest()
    record = {"seed": arguments.seed, **measured, "sha256": digest, "pixels": SIDE}
    (arguments.folder / "made.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
