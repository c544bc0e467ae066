"""The command: chooses device and sizes, runs the cases, and projects a step."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from gpu_checks import attention, engine, gaps, machine, painting, projection, sampling, training
from gpu_checks.harness import Bench, Case
from gpu_checks.scales import SCALES, Scale

RESULTS = Path(__file__).parents[1] / "results"


def cases(scale: Scale) -> list[Case]:
    """In the order of running; priorities say what is dropped last, seconds are estimates for the
    published model on a large card."""
    listed: list[tuple[str, Callable[[Bench, Scale], None], int, float]] = [
        ("0 machine", machine.machine, 0, 25),
        ("1 attention", attention.attention, 12, 30),
        ("2 decode", sampling.decode, 3, 60),
        ("3 prefill", sampling.prefilled, 8, 8),
        ("4 denoise", sampling.denoise, 1, 90),
        ("5 replay forward", training.replay_forward, 7, 60),
        ("6 update", training.update, 2, 90),
        ("7 reference", training.reference, 9, 15),
        ("8 optimizer", training.optimizer, 10, 10),
        ("9 autoencoder", training.autoencoder, 11, 20),
        ("10 step", engine.step, 4, 60),
        ("11 gaps", gaps.gaps, 5, 40),
        ("12 sd3", painting.sd3, 6, 60),
    ]
    return [
        Case(name, partial(_with, run, scale), priority, seconds * scale.slowness)
        for name, run, priority, seconds in listed
    ]


def _with(run: Callable[[Bench, Scale], None], scale: Scale, bench: Bench) -> None:
    run(bench, scale)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a case failed; one that could not run here, or not in time, has not."""
    options = _options(argv)
    device = _device(options.device)
    scale = SCALES[options.model or ("7b" if device.type == "cuda" else "mini")]()
    about = machine.header(device)
    out = options.out or _default_out(scale, about)
    out.parent.mkdir(parents=True, exist_ok=True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # as the engine does by default
    bench = Bench(device, out, scale.pace, "header")
    bench.write(status="note", model=scale.name, budget_s=options.budget, **about)
    chosen = [
        case
        for case in cases(scale)
        if not options.cases or case.name.split()[0] in options.cases.split(",")
    ]
    bench.run(chosen, options.budget)
    bench.case = "projection"
    projection.project(bench, scale)
    print(f"\n{out}" + (f": {bench.failed} failed" if bench.failed else ""))
    return 1 if bench.failed else 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="BAGEL's phases against their floors.")
    parser.add_argument("--model", choices=sorted(SCALES), help="default: 7b on CUDA, else mini")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds in all")
    parser.add_argument("--cases", default="", help="numbers, such as 0,4,6; default: all")
    parser.add_argument("--out", type=Path, help="JSON lines, appended to")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA here; --device cpu runs the miniature")
    return options


def _device(wanted: str) -> torch.device:
    found = torch.cuda.is_available() if wanted == "auto" else wanted == "cuda"
    return torch.device("cuda", torch.cuda.current_device()) if found else torch.device("cpu")


def _default_out(scale: Scale, about: dict[str, object]) -> Path:
    device = re.sub(r"[^a-z0-9]+", "-", str(about["device"]).lower()).strip("-")
    return RESULTS / f"gpu_check-{scale.name}-{device}-{about['git'] or 'unknown'}.jsonl"
