"""The figures of docs/results.md: trains recipes with several seeds and prints a table.

    python benchmarks/learning.py --seeds 0,1,2 no_cfg_mse text_only image_only random_reward

Runs go to ``--out`` (default runs/learning), one folder each, ``--jobs`` at a time in processes of
one thread; a folder that has a summary already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

SHOWN = ("", "/thought", "/faithfulness", "/quality")
REWARD = "board_verifier"


def train(recipe: str, seed: int, out: Path) -> Path:
    """Runs one recipe unless it is done; returns its folder."""
    folder = out / f"{recipe}-seed{seed}"
    if (folder / "summary.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted call left
    command = [sys.executable, "-m", "unigrpo_core", "run", recipe, "--out", str(folder)]
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{recipe}-seed{seed}.log").open("w") as log:
        subprocess.run(
            [*command, "--set", f"seed={seed}"],
            check=True,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **quiet},
        )
    return folder


def row(folder: Path) -> str:
    """The table's row of a finished run."""
    summary = json.loads((folder / "summary.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    before, after = summary["before"], summary["after"]
    pairs = [f"{before[REWARD + name]:.3f} > {after[REWARD + name]:.3f}" for name in SHOWN]
    clips = [step["image/clip_fraction"] for step in steps if "image/clip_fraction" in step]
    gaps = {
        name: max((step[name] for step in steps if name in step), default=None)
        for name in ("gap/text_mean", "gap/text_max", "gap/image_log_ratio")
    }
    worst = " / ".join("-" if gap is None else f"{gap:.0e}" for gap in gaps.values())
    clip = f"{mean(clips):.3f}" if clips else "-"
    cells = [
        summary["recipe"],
        str(summary["seed"]),
        str(summary["steps"]),
        *pairs,
        f"{summary['gain'][REWARD]:+.3f}",
        clip,
        worst,
        f"{summary['train_cpu_s']:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+", metavar="RECIPE")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    cells = [(recipe, seed) for recipe in arguments.recipes for seed in seeds]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        folders = list(pool.map(lambda cell: train(*cell, arguments.out), cells))
    print(
        "| recipe | seed | steps | verifier | thought | faithfulness | quality | gain "
        "| image clip fraction | worst gap: text mean / max / image | CPU-s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for folder in folders:
        print(row(folder))


if __name__ == "__main__":
    main()
