"""What loading takes of the host's memory, on a scaled-down BAGEL of about 170 MB in the published
layout, bfloat16 and random. Run with ``make bench``, or alone:

    python benchmarks/bench_loading.py            # one line of JSON per case
    python benchmarks/bench_loading.py bf16       # one case, in this process

The figure is the peak of resident memory while ``load_bagel`` runs, above what was resident just
before it, as a share of the weights' file. The tokenizer has been read once by then, so that its
imports do not count. At best it is the size in memory: 1 for bfloat16, 2 where all experts train,
in float32.
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from unigrpo_board.make_checkpoint import write_tokenizer
from unigrpo_models.bagel.checkpoint import write_config
from unigrpo_models.bagel.config import BagelConfig, LanguageConfig, Latent
from unigrpo_models.bagel.network import BagelNetwork
from unigrpo_models.bagel.policy import load_bagel
from unigrpo_models.bagel.tokens import Codec
from unigrpo_models.stored import write_header

from unigrpo_core.plugin import Placement

CONFIG = BagelConfig(
    llm=LanguageConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=2,
        rope_theta=1e6,
    ),
    latent=Latent(space="pixels"),  # needs no autoencoder; a token is as wide as the published one
)
CASES = {
    "bf16": (torch.bfloat16, frozenset[str]()),
    "bf16, image trained": (torch.bfloat16, frozenset({"image"})),
    "float32": (torch.float32, frozenset[str]()),
    "bf16, all trained": (torch.bfloat16, frozenset({"text", "image"})),
}
CPU = torch.device("cpu")


def write_scaled_down(folder: Path) -> int:
    """Writes the checkpoint; returns the bytes of its weights. All tensors repeat one random block
    of small numbers."""
    write_config(folder, CONFIG)
    write_tokenizer(folder)
    with torch.device("meta"):
        network = BagelNetwork(CONFIG)
    described = {
        name: ("F32" if "pos_embed" in name else "BF16", tuple(x.shape))
        for name, x in network.state_dict().items()
    }
    block = (torch.randn(1 << 18) * 0.02).bfloat16().view(torch.uint8).numpy().tobytes()
    path = folder / "ema.safetensors"
    with path.open("wb") as out:
        for name in write_header(out, described):
            kind, shape = described[name]
            left = torch.Size(shape).numel() * (4 if kind == "F32" else 2)
            while left > 0:
                left -= out.write(block[:left])
    return path.stat().st_size


def resident() -> int:
    """Bytes of resident memory; where the system does not tell, its peak so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak()


def peak() -> int:
    """Bytes of the peak so far. What getrusage says has been that of whoever started the process,
    if that was larger."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(case: str) -> dict[str, object]:
    """Loads once, in this process, which must be a fresh one."""
    compute, train = CASES[case]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_scaled_down(folder)
        Codec.read(folder, CONFIG.llm.vocab_size, 64, "")
        before = resident()
        policy = load_bagel(folder, "", Placement(CPU, compute, train))
        most, after = peak(), resident()
    weights = sum(x.numel() * x.element_size() for x in policy.network.state_dict().values())
    shares = {"peak": most - before, "after": after - before, "weights": weights}
    return {
        "case": case,
        "file_mb": round(size / 1e6, 1),
        **{key: round(value / size, 3) for key, value in shares.items()},
    }


def measured_apart(case: str) -> dict[str, object]:
    """Loads once, in a process of its own."""
    command = [sys.executable, __file__, case]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scaled-down")
    write_scaled_down(folder)
    yield folder
    (folder / "ema.safetensors").unlink()


@pytest.mark.parametrize("case", CASES)
def bench_loading(benchmark, folder, case):
    """Seconds from the page cache; the memory is in ``extra_info``."""
    place = Placement(CPU, *CASES[case])
    policy = benchmark.pedantic(load_bagel, (folder, "", place), rounds=3)
    assert policy.network.vae2llm.weight.device == CPU
    if not benchmark.disabled:
        benchmark.extra_info.update(measured_apart(case))


if __name__ == "__main__":
    for chosen in sys.argv[1:]:
        print(json.dumps(measure(chosen)))
    if len(sys.argv) == 1:
        for each in CASES:
            print(json.dumps(measured_apart(each)), flush=True)
