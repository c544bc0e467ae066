"""Case 0: what the machine reaches, which every share is measured by."""

from __future__ import annotations

import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from unigrpo_models.bagel.accounting import Work

from gpu_checks.harness import Bench, Entry
from gpu_checks.rows import Peaks
from gpu_checks.scales import Scale

ROOT = Path(__file__).parents[2]
STATE = ("clocks.sm", "clocks.max.sm", "power.draw", "power.limit")


def header(device: torch.device) -> dict[str, Any]:
    """What a result must say of where it comes from; no name of a host."""
    found: dict[str, Any] = {
        "git": _said("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_said("git", "-C", str(ROOT), "status", "--porcelain", "-uno")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "driver": None,
        "device": "cpu",
        "memory_gb": None,
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {"device": about.name, "memory_gb": about.total_memory / 1e9}
        found["driver"] = _nvidia("driver_version").get("driver_version")
    return found


def _said(*command: str) -> str | None:
    """What a command prints; None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _nvidia(*names: str) -> dict[str, str]:
    query = f"--query-gpu={','.join(names)}"
    line = _said("nvidia-smi", query, "--format=csv,noheader,nounits", "-i", "0")
    return dict(zip(names, line.split(", "), strict=False)) if line else {}


def machine(bench: Bench, scale: Scale) -> None:
    device, dtype = bench.device, scale.compute
    side = scale.side
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    work = Work(2.0 * side**3, 3.0 * side**2 * left.element_size())

    def burst() -> None:
        for _ in range(10):
            torch.mm(left, right)

    name = f"{side}^3 {str(dtype).removeprefix('torch.')}"
    fast = [bench.once(burst) / 10 for _ in range(4)][1:]
    steady, state = _sustained(bench, left, right, scale.sustained)
    bandwidth = max(_bandwidths(bench, scale))
    bench.peaks = Peaks(work.flops / min(fast) * 1e3, work.flops / steady * 1e3, bandwidth)
    bench.measured(Entry(f"burst {name}", burst, work), fast, bench.peak_gb())
    extra = {"seconds": scale.sustained, **state}
    bench.measured(Entry(f"sustained {name}", burst, work, extra=extra), [steady], bench.peak_gb())
    _products(bench, scale)


def _sustained(
    bench: Bench, left: Tensor, right: Tensor, seconds: float
) -> tuple[float, dict[str, str]]:
    """Milliseconds per product under load that lasts, and clocks and power in the midst of it."""
    count, start = 0, time.perf_counter()
    with ThreadPoolExecutor(1) as beside:  # asked while products run
        asked = None
        while time.perf_counter() - start < seconds:
            for _ in range(50):
                torch.mm(left, right)
            count += 50
            if bench.cuda:
                torch.cuda.synchronize(bench.device)
                if asked is None and time.perf_counter() - start > seconds / 2:
                    asked = beside.submit(_nvidia, *STATE)
        spent = time.perf_counter() - start
        return 1e3 * spent / count, {} if asked is None else asked.result()


def _bandwidths(bench: Bench, scale: Scale) -> list[float]:
    """Bytes per second, copying and only reading."""
    source = torch.randn(scale.copied // 4, device=bench.device)
    target = torch.empty_like(source)
    runs = {"copy": (lambda: target.copy_(source), 2), "read": (source.amax, 1)}
    found = []
    for name, (run, factor) in runs.items():
        moved = Work(0.0, float(factor * source.numel() * source.element_size()))
        calls = [bench.once(run) for _ in range(6)][2:]
        bench.measured(Entry(name, run, moved), calls, bench.peak_gb())
        found.append(moved.bytes / min(calls) * 1e3)
    return found


def _products(bench: Bench, scale: Scale) -> None:
    """BAGEL's own products: gate and up together, down, and q, k and v together."""
    llm = scale.config.llm
    heads = (llm.num_attention_heads + 2 * llm.num_key_value_heads) * llm.head_dim
    width, inner = llm.hidden_size, llm.intermediate_size
    tokens = scale.latent_tokens("small") + 2
    for rows in (tokens, 4 * tokens, 32 * tokens):
        entries = []
        for inside, outside in ((width, 2 * inner), (inner, width), (width, heads)):
            x = torch.randn(rows, inside, device=bench.device, dtype=scale.compute)
            weight = torch.randn(outside, inside, device=bench.device, dtype=scale.compute)
            size = x.element_size() * (rows * (inside + outside) + inside * outside)
            work = Work(2.0 * rows * inside * outside, float(size))

            def run(x: Tensor = x, weight: Tensor = weight) -> Tensor:
                return torch.nn.functional.linear(x, weight)

            entries.append(Entry(f"{rows} x {inside} x {outside}", run, work))
        bench.race(*entries)
