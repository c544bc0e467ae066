"""The paper's ablation from the first verb to the last, made short: one step of two prompts."""

import json
import os
import subprocess
import sys

import pytest

CELLS = ("joint", "image", "image_then_text", "image_no_thought", "cfg")
SHORT = (
    *("steps=1", "prompts=2", "group.fan_out=[2, 1]", "optimizer.warmup_updates=0"),
    *("evaluation.every=0", "evaluation.final_prompts=6", "evaluation.sheet=0"),
)


def unigrpo(*words):
    done = subprocess.run(
        [sys.executable, "-m", "unigrpo_core", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sets(*overrides):
    return [word for override in overrides for word in ("--set", override)]


@pytest.mark.slow
def test_the_stars_run_and_compare(tmp_path):
    out = ["--out", str(tmp_path / "paper")]
    episode = [item for item in SHORT if not item.startswith("group")]
    thinking = [f"paper/{name}" for name in CELLS if name != "image_no_thought"]
    said = unigrpo("ablate", *thinking, "--jobs", "2", *sets(*SHORT), *out)
    assert "4 cells x 1 seed = 4 runs" in said
    assert said.index("image seed 0: done") < said.index("image_then_text seed 0: done")
    fan_out = "group.fan_out=[4]"
    unigrpo("ablate", "paper/image_no_thought", *sets(*episode, fan_out), *out)
    unigrpo("ablate", "paper/none", *sets(*episode[2:]), *out)

    figure = tmp_path / "figure.svg"
    printed = unigrpo("compare", out[1], "--format", "json", "--figure", str(figure))
    cells = {cell["cell"]: cell for cell in json.loads(printed)["cells"]}
    assert set(cells) == {*CELLS, "none"}
    starts = {cell["metrics"]["board_verifier"]["start"]["mean"] for cell in cells.values()}
    after_image = cells["image"]["metrics"]["board_verifier"]["final"]["mean"]
    assert starts == {cells["none"]["metrics"]["board_verifier"]["final"]["mean"], after_image}
    calls = {name: cell["cost"]["calls_per_image"] for name, cell in cells.items()}
    assert calls["cfg"]["mean"] == 2 * calls["joint"]["mean"] == 16
    staged = {name for name, cell in cells.items() if cell["cost"]["staged"]}
    assert staged == {"image_then_text"}
    for view in ("guided", "silent", "swapped"):
        assert all(f"{view}:board_verifier" in cell["metrics"] for cell in cells.values())
    assert b"<text" in figure.read_bytes()
