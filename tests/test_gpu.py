"""What holds on a CPU holds on a card: laws, draws, golden values, and memory that stays.

``UNIGRPO_TEST_DEVICE=cpu pytest tests/test_gpu.py`` runs these tests where there is no card, to see
that they themselves are right.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import lines, prompts
from unigrpo_models.bagel.config import BagelConfig, LanguageConfig, Latent
from unigrpo_models.bagel.network import BagelNetwork
from unigrpo_models.bagel.policy import load_bagel
from unigrpo_models.sampling import draw_tokens

from unigrpo_core.keys import Key, normals, uniforms
from unigrpo_core.plugin import Placement
from unigrpo_core.records import Sampling

DEVICE = os.environ.get("UNIGRPO_TEST_DEVICE", "cuda")
CUDA = DEVICE != "cpu"
NEEDED = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
pytestmark = NEEDED if CUDA else []
GOLDEN = Path(__file__).parent / "data" / "bagel_golden"
KEYS = [Key(("gpu", row)) for row in range(8)]

TRAIN = """
import json, sys
from pathlib import Path
import tiny, torch

class Memory(tiny.Silent):
    def stepped(self, step, metrics, timing):
        if torch.cuda.is_available():
            held.append(torch.cuda.memory_allocated())

held = []
folder, checkpoint, *overrides = sys.argv[1:]
tiny.Run(tiny.recipe(Path(folder), Path(checkpoint), *overrides), Path(folder) / "run", Memory())()
print(json.dumps(held))
"""


@pytest.fixture(autouse=True)
def exact():
    """float32 is float32, TF32 is not."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def train(folder, checkpoint, *overrides):
    """Trains in a process of its own, since accelerate settles on one device; returns the bytes
    held on the card after each step. The engine stops it where law 3's gaps are too large."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    arguments = [str(folder), str(checkpoint), f"compute.device='{DEVICE}'", *overrides]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_two_steps_train_within_the_limits_of_the_gaps(tmp_path, checkpoint, precision):
    train(tmp_path, checkpoint, f"compute.precision='{precision}'")
    steps = lines(tmp_path / "run")
    assert len(steps) == 2
    for step in steps:
        assert step["gap/text_mean"] <= (1e-5 if precision == "float32" else 0.02)
        assert step["gap/image_radius_share"] <= 0.25
        assert step["text/grad_norm"] > 0
        assert step["image/grad_norm"] > 0


def test_memory_stays(tmp_path, checkpoint):
    """Nothing of a step is left after the next one but what the first left, the moments."""
    held = train(tmp_path, checkpoint, "steps=5", "evaluation.every=0")
    if not CUDA:
        pytest.skip("a CPU's memory is not counted")
    assert len(held) == 5
    assert max(held[2:]) <= 1.01 * held[1]


def test_draws_are_those_of_the_cpu():
    assert torch.equal(normals(KEYS, (3, 5), DEVICE).cpu(), normals(KEYS, (3, 5), "cpu"))
    assert torch.equal(uniforms(KEYS, 50, DEVICE).cpu(), uniforms(KEYS, 50, "cpu"))


def test_tokens_are_drawn_alike():
    """From the same logits, over more than one chunk of the two-level CDF."""
    logits = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)) * 3
    for turn in range(20):
        uniform = uniforms([key.child(turn) for key in KEYS], 1, "cpu")[:, 0]
        here = draw_tokens(logits.to(DEVICE), uniform.to(DEVICE))
        assert torch.equal(here.cpu(), draw_tokens(logits, uniform))


def test_thoughts_in_float32_are_those_of_the_cpu(checkpoint):
    written = {}
    for name in (DEVICE, "cpu"):
        place = Placement(torch.device(name), torch.float32, frozenset())
        policy = load_bagel(checkpoint, "", place)
        history = policy.open(prompts(4)).rows(torch.arange(4).repeat_interleave(2))
        text, _ = policy.write(history, Sampling(12), KEYS)
        written[name] = [
            row[kept].tolist() for row, kept in zip(text.tokens.cpu(), text.mask.cpu(), strict=True)
        ]
    assert written[DEVICE] == written["cpu"]
    assert len({tuple(row) for row in written["cpu"]}) > 1


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_thoughts_by_cuda_graphs_are_those_without(checkpoint, compute):
    """Long enough for turns that are recorded, replayed, and recorded again for more slots."""
    written = []
    for graphs in (False, True):
        place = Placement(torch.device(DEVICE), compute, frozenset(), cuda_graphs=graphs)
        policy = load_bagel(checkpoint, "", place)
        history = policy.open(prompts(4)).rows(torch.arange(4).repeat_interleave(2))
        text, _ = policy.write(history, Sampling(40), KEYS)
        written.append(text)
    assert torch.equal(written[0].tokens, written[1].tokens)
    torch.testing.assert_close(written[0].logps, written[1].logps, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def golden():
    return {name: x.to(DEVICE) for name, x in load_file(GOLDEN / "golden.safetensors").items()}


@pytest.fixture(scope="module")
def network():
    meta = json.loads((GOLDEN / "tiny_meta.json").read_text())
    config = BagelConfig(
        llm=LanguageConfig.model_validate_json((GOLDEN / "llm_config.json").read_text()),
        latent=Latent(patch=meta["latent_patch_size"], max_size=meta["max_latent_size"]),
    )
    built = BagelNetwork(config)
    weights = load_file(GOLDEN / "weights.safetensors")
    built.load_state_dict({name: weights[name].float() for name in built.state_dict()})
    return built.to(DEVICE).requires_grad_(False)


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("case", ["a", "b"])
def test_golden_text(network, golden, case):
    hidden, caches = network.text(golden[f"{case}.text_ids"][None])
    close(hidden[0], golden[f"{case}.text_hidden"])
    close(network.language_model.lm_head(hidden[0]), golden[f"{case}.text_logits"])
    for layer, (k, v) in enumerate(caches):
        close(k[0].transpose(0, 1), golden[f"{case}.kv_k"][layer])
        close(v[0].transpose(0, 1), golden[f"{case}.kv_v"][layer])


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize("size", ["s0", "s1"])
def test_golden_velocity(network, golden, case, size):
    meta = json.loads((GOLDEN / "tiny_meta.json").read_text())["special_tokens"]
    ids = golden[f"{case}.text_ids"][None]
    stride = network.config.latent.stride
    height, width = (side // stride for side in golden[f"{size}.image_hw"].tolist())
    for k in range(3):
        got = network.velocity(
            golden[f"{size}.x_t{k}"][None],
            golden["timesteps"][k].view(1).float(),
            network.table_rows(height, width),
            torch.tensor([[meta["start_of_image"], meta["end_of_image"]]], device=DEVICE),
            torch.tensor([ids.shape[1]], device=DEVICE),
            network.text(ids)[1],
            None,
        )
        close(got[0], golden[f"{case}.{size}.t{k}.v_cond"])
