"""Remakes the embedded scorer: ``python -m unigrpo_board.make_scorer FOLDER``.

Two small towers learn, contrastively and on training compositions only, which prompt a picture goes
with. The pairs are few and noisy, so that the scorer is useful and no perfect judge: some pictures
show a misread prompt, some miss or replace an object, and the pixels are noisy or blurred. Nothing
teaches it what an image that nobody drew is worth: that is what reinforcement can exploit.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unigrpo_board.make_checkpoint import misread, spoil
from unigrpo_board.scene import WORDS, Scene, draw_scene, lay_out, say
from unigrpo_board.scorer_network import WEIGHTS, ScorerConfig, ScorerNetwork
from unigrpo_board.verifier import draw, grid, read, verify
from unigrpo_core.keys import Key

CONFIG = ScorerConfig(words=WORDS, channels=(32, 48, 64), hidden=64, width=64)
PAIRS = 6000
MISREAD = 0.15
SPOILED = 0.15
NOISE = 0.15  # highest standard deviation of a picture's pixel noise
BLURRED = 0.3
BATCH = 64
STEPS = 1500
RATE = 1e-3
DECAY = 0.01
SCALE = 10.0  # the cosines' factor in the contrast
JUDGED = 512  # held-out prompts that it is measured on, with four pictures each
RETRIEVED = 256  # held-out compositions for the retrieval


def pairs(rng: np.random.Generator, count: int) -> tuple[Tensor, list[str]]:
    """Noisy pictures [count, 3, 24, 24] in [0, 1] and their prompts."""
    texts, cells = [], []
    for _ in range(count):
        scene = draw_scene(rng, lambda scene: scene.trained)
        objects = lay_out(misread(scene, rng) if rng.random() < MISREAD else scene, rng)
        cells.append(grid(spoil(objects, rng) if rng.random() < SPOILED else objects))
        texts.append(say(scene, rng))
    return dirty(draw(np.stack(cells)), rng), texts


def dirty(pictures: np.ndarray, rng: np.random.Generator) -> Tensor:
    """The pictures, some blurred over 3 x 3 pixels, each with noise of its own strength."""
    clean = torch.from_numpy(pictures)
    blurred = torch.from_numpy(rng.random(len(clean)) < BLURRED).view(-1, 1, 1, 1)
    soft = F.avg_pool2d(F.pad(clean, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    strength = torch.from_numpy(rng.random((len(clean), 1, 1, 1), dtype=np.float32)) * NOISE
    noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
    return (torch.where(blurred, soft, clean) + strength * noise).clamp(0, 1)


def contrast(network: ScorerNetwork, images: Tensor, counts: Tensor) -> Tensor:
    """InfoNCE, both ways: each picture finds its prompt among the batch, and the reverse."""
    seen = F.normalize(network.encode_image(images), dim=1)
    said = F.normalize(network.encode_text(counts), dim=1)
    logits = SCALE * seen @ said.T
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def train(seed: int) -> ScorerNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ScorerNetwork(CONFIG)
    rng = Key((seed, "board", "scorer")).generator()
    images, texts = pairs(rng, PAIRS)
    counts = network.count(texts)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        rows = torch.from_numpy(rng.choice(PAIRS, BATCH, replace=False))
        loss = contrast(network, images[rows], counts[rows])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        if (step + 1) % 250 == 0:
            cpu = time.process_time()
            print(f"step {step + 1:5d}  loss {loss.item():.3f}  cpu {cpu:.0f} s", flush=True)
    return network.requires_grad_(False).eval()


def held_out(rng: np.random.Generator) -> Scene:
    return draw_scene(rng, lambda scene: scene.held_out)


def judge(network: ScorerNetwork) -> dict[str, float]:
    """Against the verifier, on held-out prompts with four clean pictures each: as asked, spoiled,
    misread, and of another scene. ``pair_accuracy`` is the share of pairs of one prompt's pictures
    which the verifier tells apart by more than .1 and the scorer orders alike; ``correlation`` is
    Pearson's over all pictures."""
    rng = Key(("board", "scorer", "judged")).generator()
    texts, scenes, cells = [], [], []
    for _ in range(JUDGED):
        scene = held_out(rng)
        text = say(scene, rng)
        right = lay_out(scene, rng)
        shown = (
            *(right, spoil(right, rng)),
            *(lay_out(misread(scene, rng), rng), lay_out(held_out(rng), rng)),
        )
        cells += [grid(objects) for objects in shown]
        texts += [text] * len(shown)
        scenes += [scene] * len(shown)
    images = torch.from_numpy(draw(np.stack(cells)))
    gold = np.array([verify(s, seen) for s, seen in zip(scenes, read(images), strict=True)])
    proxy = network.cosine(images, texts).double().numpy()
    by_gold, by_proxy = (x.reshape(JUDGED, 4, 1) - x.reshape(JUDGED, 1, 4) for x in (gold, proxy))
    apart = by_gold > 0.1
    return {
        "pair_accuracy": round(float((by_proxy[apart] > 0).mean()), 3),
        "correlation": round(float(np.corrcoef(gold, proxy)[0, 1]), 3),
    }


def retrieve(network: ScorerNetwork, evaluate: Callable[..., dict[str, float]]) -> dict[str, float]:
    """Recall among one clean picture and one prompt of each of ``RETRIEVED`` compositions."""
    rng = Key(("board", "scorer", "retrieved")).generator()
    found: dict[Scene, None] = {}
    while len(found) < RETRIEVED:
        found.setdefault(held_out(rng))
    images = torch.from_numpy(draw(np.stack([grid(lay_out(scene, rng)) for scene in found])))
    texts = [[say(scene, rng)] for scene in found]
    measured = evaluate(
        network, [(images, texts)], network.count, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    return {name: round(value, 3) for name, value in measured.items()}


def benchmark() -> Callable[..., dict[str, float]]:
    """The function of clip-benchmark that measures retrieval.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        from clip_benchmark.metrics.zeroshot_retrieval import evaluate
    except ImportError as error:
        raise SystemExit(
            f"the scorer's retrieval is measured by clip-benchmark, which cannot be imported "
            f"({error}); install it without what it does not need here: "
            "pip install --no-deps clip-benchmark tqdm"
        ) from None
    measure: Callable[..., dict[str, float]] = evaluate
    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    evaluate = benchmark()
    torch.set_num_threads(1)
    network = train(arguments.seed)
    network.save(arguments.folder)
    record: dict[str, Any] = {
        "seed": arguments.seed,
        "pairs": PAIRS,
        "steps": STEPS,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        **judge(network),
        **retrieve(network, evaluate),
        "sha256": sha256((arguments.folder / WEIGHTS).read_bytes()).hexdigest(),
    }
    (arguments.folder / "made.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
