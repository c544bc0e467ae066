"""``unigrpo run`` and ``unigrpo sample``, as a user has them; needs the distribution installed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from io import StringIO

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from unigrpo_core import cli
from unigrpo_core.catalog import load_catalog
from unigrpo_core.cli.display import Lines, Live, progress_on
from unigrpo_core.recipe import find_recipe, load_recipe, shipped_titles

BRIEF = (
    *("--set", "prompts=2"),
    *("--set", "steps=2"),
    *("--set", "evaluation.every=1"),
    *("--set", "evaluation.prompts=2"),
    *("--set", "evaluation.final_prompts=3"),
    *("--set", "compute.device=cpu"),
)
WORDS = "two red circle"


@pytest.fixture
def unigrpo(capsys):
    def run(*argv):
        code = cli.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two steps of the first recipe on the embedded checkpoint; run folder and what was printed."""
    folder = tmp_path_factory.mktemp("finished")
    out, code = folder / "run", 0
    from contextlib import redirect_stdout

    with redirect_stdout(StringIO()) as printed:
        code = cli.main(
            ["run", "recipes/no_cfg_mse.toml", "--out", str(out), *BRIEF,
             "--set", "group.fan_out=[3, 1]"]
        )  # fmt: skip
    assert code == 0
    return out, printed.getvalue()


# --- run --------------------------------------------------------------------------------------


def test_the_run_folder_is_complete(finished):
    out, _ = finished
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {
        "run.json", "recipe.toml", "summary.json", "metrics.jsonl", "timing.jsonl",
        "evaluation.jsonl", "final/ema.safetensors", "final/llm_config.json",
        "final/config.json", "final/tokenizer.json", "sheets/before-after.png",
        "sheets/step-00000.png", "sheets/step-00001.png", "sheets/step-00002.png",
    } <= names  # fmt: skip
    assert any("events.out.tfevents" in name for name in names)
    assert not any(".part" in name for name in names)
    for name, count in (("metrics.jsonl", 2), ("timing.jsonl", 2), ("evaluation.jsonl", 3)):
        assert len([json.loads(line) for line in (out / name).open()]) == count


def test_the_summary_is_what_was_measured(finished):
    out, _ = finished
    summary = json.loads((out / "summary.json").read_text())
    rows = [json.loads(line) for line in (out / "evaluation.jsonl").open()]
    for name in ("board_verifier", "board_verifier/quality"):
        assert summary["before"][name] == rows[0][name]
        assert summary["after"][name] == rows[-1][name]
        assert summary["gain"][name] == rows[-1][name] - rows[0][name]
    assert summary["steps"] == 2
    assert summary["train_cpu_s"] > 0
    assert summary["hash"] == json.loads((out / "run.json").read_text())["hash"]


def test_metrics_show_both_experts_and_the_gap(finished):
    out, _ = finished
    for line in (out / "metrics.jsonl").open():
        figures = json.loads(line)
        for expert in ("text", "image"):
            for name in ("loss", "clip_fraction", "grad_norm"):
                assert np.isfinite(figures[f"{expert}/{name}"])
        assert figures["image/velocity_mse"] >= 0
        assert figures["gap/text_mean"] <= 1e-5
        assert figures["gap/text_max"] <= 1e-4
        assert figures["gap/image_log_ratio"] <= min(1e-6, 0.05 * 5.1e-4 / 1728**0.5)
        assert 0 <= figures["reward/board_verifier"] <= 1


def test_plain_lines_when_it_is_no_terminal(finished):
    out, printed = finished
    assert "\x1b" not in printed
    assert "\r" not in printed
    text = printed.splitlines()
    assert text[0].startswith("no_cfg_mse: UniGRPO")
    assert "trains text and image on cpu, float32" in text[1]
    assert [line[:8] for line in text if line.startswith("step ")] == ["step 1/2", "step 2/2"]
    assert sum(line.startswith("held-out prompts at step") for line in text) == 3
    for word in ("reward", "gap text", "clip", "velocity_mse", "tokens/s", "images/s", "left"):
        assert word in next(line for line in text if line.startswith("step 1/2")), word
    table = printed[printed.index("before") :]
    assert re.search(r"board_verifier\W+0\.\d{3}\W+0\.\d{3}\W+[+-]0\.\d{3}", table)
    assert str(out) in table.replace("\n", "")


FIGURES = {
    "reward": 0.4312, "text/clip_fraction": 0.03, "image/clip_fraction": 0.21,
    "gap/text_mean": 3e-7, "gap/image_log_ratio": 2e-9, "image/velocity_mse": 1.2e-5,
    "text/equal_groups": 0.25, "image/equal_groups": 0.0, "tokens": 1872, "images": 144,
}  # fmt: skip
SHOWN = (
    "reward 0.431  held-out board_verifier 0.445  gap text 3e-07  image 2e-09  text clip 0.03  "
    "image clip 0.21  velocity_mse 1.2e-05  936 tokens/s  72 images/s"
)

FIGURE_WORDS = {*SHOWN.split()}


class Recipe:
    """What the display reads of a resolved recipe and its setup."""

    name = "no_cfg_mse"
    title = device = precision = ""
    steps, train = 60, ("text",)

    @property
    def recipe(self):
        return self

    compute = recipe


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_live_display_shows_every_figure(width, tmp_path):
    console = Console(width=width, file=StringIO(), force_terminal=True, color_system=None)
    live = Live(progress_on(console))
    live.started(Recipe(), tmp_path, Recipe())
    live.evaluated(0, {"board_verifier": 0.445})
    live.stepped(12, FIGURES, {"text_s": 2.0, "image_s": 2.0})
    with console.capture() as captured:
        console.print(live.progress.get_renderable())
    rows = captured.get().splitlines()
    assert all(len(row) <= width for row in rows)
    text = " ".join(" ".join(rows).split())
    assert "\u2026" not in text
    assert re.search(r"^\S* ?\S* step 12/60 left \d+ s", " ".join(rows[0].split()))
    assert all(text.split().count(word) == SHOWN.split().count(word) for word in FIGURE_WORDS)
    assert len(rows) <= 6


def test_the_time_left_counts_from_after_the_first_evaluation(monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    lines = Lines(Console(width=200, quiet=True))
    lines.started(Recipe(), tmp_path, Recipe())
    now[0] = 1000.0
    lines.evaluated(0, {})
    now[0] = 1010.0
    assert lines.left(10) == "left 50 s"
    lines.evaluated(10, {})
    now[0] = 1030.0
    assert lines.left(20) == "left 60 s"


def test_the_sheets_are_pictures_of_the_expected_size(finished):
    out, _ = finished
    sizes = {}
    for name in ("step-00000", "step-00002", "before-after"):
        with Image.open(out / "sheets" / f"{name}.png") as sheet:
            sheet.load()
            sizes[name] = sheet.size
            pixels = np.asarray(sheet.convert("RGB"))
            assert len(np.unique(pixels.astype(int) @ [65536, 256, 1])) > 50
    assert sizes["step-00000"] == sizes["step-00002"]
    width, height = sizes["step-00000"]
    assert sizes["before-after"][0] > 2 * width
    assert 300 < height < 1000


def test_final_weights_have_the_layout_they_came_in(finished):
    from importlib.util import find_spec
    from pathlib import Path

    out, _ = finished
    start = load_file(Path(find_spec("unigrpo_board").origin).parent / "checkpoint/ema.safetensors")
    end = load_file(out / "final" / "ema.safetensors")
    assert {n: x.shape for n, x in end.items()} == {n: x.shape for n, x in start.items()}
    table = "latent_pos_embed.pos_embed"
    assert torch.equal(end[table], start[table])
    assert any(not torch.equal(end[n], start[n]) for n in end)


def test_an_empty_folder_is_taken_and_a_broken_checkpoint_leaves_none(
    unigrpo, tmp_path, checkpoint
):
    empty = tmp_path / "empty"
    empty.mkdir()
    bad = tmp_path / "bad"
    bad.mkdir()
    code, _, err = unigrpo(
        "run", "no_cfg_mse", "--out", empty, *BRIEF, "--set", f"policy.checkpoint='{bad}'"
    )
    assert code == 1
    assert "is no BAGEL checkpoint" in err
    assert list(empty.iterdir()) == []
    (bad / "llm_config.json").write_text((checkpoint / "llm_config.json").read_text())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (bad / name).write_text((checkpoint / name).read_text())
    (bad / "ema.safetensors").write_bytes((checkpoint / "ema.safetensors").read_bytes()[:999])
    code, _, err = unigrpo(
        "run", "no_cfg_mse", "--out", empty, *BRIEF, "--set", f"policy.checkpoint='{bad}'"
    )
    assert code == 1
    assert "ema.safetensors is damaged" in err


LARGE = ("bagel/", "sd35/", "qwen3/", "qwen3_sd35/")
"""Recipes of models to be downloaded; their miniatures run in test_bagel_recipes.py,
test_painters*.py, test_causal_run.py and test_composed.py."""


@pytest.mark.parametrize("name", [name for name in shipped_titles() if not name.startswith(LARGE)])
def test_every_shipped_recipe_runs_two_steps(unigrpo, tmp_path, checkpoint, name):
    """On a tiny model; its group shape and every other choice are the recipe's own."""
    if name in ("paper/image_then_text", "paper/none"):
        pytest.skip("trains after another run, or nothing: tests/test_paper_ablation.py has both")
    *_, last = stated = load_recipe(find_recipe(name), load_catalog()).recipe.group.fan_out
    fan_out = [3] if len(stated) == 1 else [2, 3] if last > 1 else [3, 1]
    code, out, err = unigrpo(
        "run", name, "--out", tmp_path / "run", *BRIEF,
        "--set", f"policy.checkpoint='{checkpoint}'", "--set", "evaluation.sheet=0",
        "--set", f"group.fan_out={fan_out}",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "step 2/2" in out
    figures = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert len(figures) == 2
    assert all(np.isfinite(value) for row in figures for value in row.values())


def test_runs_are_numbered(unigrpo, tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        code, _, _ = unigrpo(
            "run", "text_only", *BRIEF, "--set", "steps=0", "--set", "train=[]",
            "--set", f"policy.checkpoint='{checkpoint}'",
        )  # fmt: skip
        assert code == 0
        assert (tmp_path / "runs" / f"text_only-{number}" / "summary.json").exists()


def test_interrupted(tmp_path, checkpoint):
    """Ctrl-C ends a run with 130; what was measured so far is whole."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "unigrpo_core", "run", "text_only", "--out", str(out), *BRIEF,
         "--set", "steps=100000", "--set", "evaluation.every=0", "--set", "evaluation.sheet=0",
         "--set", "group.fan_out=[3, 1]", "--set", f"policy.checkpoint='{checkpoint}'"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # However the tests were started, Ctrl-C means what it means in a terminal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    metrics = out / "metrics.jsonl"
    try:
        limit = time.monotonic() + 120
        while time.monotonic() < limit and process.poll() is None:
            if metrics.exists() and metrics.read_text().count("\n") >= 2:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    text = metrics.read_text()
    assert text.endswith("\n")
    steps = [json.loads(line)["step"] for line in text.splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 2
    told = f"{out} keeps what was measured up to step {steps[-1]} of 100000"
    assert err == f"interrupted\n{told}\n"
    assert not (out / "final").exists()
    assert not (out / "summary.json").exists()


# --- sample -----------------------------------------------------------------------------------


def test_sample_draws_a_new_prompt(finished, unigrpo, tmp_path):
    out, _ = finished
    picture = tmp_path / "new.png"
    code, printed, err = unigrpo("sample", out, WORDS, "--count", 2, "--out", picture)
    assert (code, err) == (0, "")
    text = printed.splitlines()
    assert len(text) == 3
    assert all(re.fullmatch(r"thinks: [a-z ]+", line) for line in text[:2])
    assert text[2] == f"picture: {picture}"
    with Image.open(picture) as sheet:
        assert sheet.size[1] > 2 * 144


def test_sample_repeats_itself_and_another_seed_does_not(finished, unigrpo, tmp_path):
    out, _ = finished
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 7)):
        files.append(tmp_path / f"{name}.png")
        code, *_ = unigrpo("sample", out, WORDS, "--seed", seed, "--out", files[-1])
        assert code == 0
    pictures = [np.asarray(Image.open(file).convert("RGB"))[70:] for file in files]
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_sample_numbers_its_pictures_and_leaves_the_run_as_it_was(finished, unigrpo):
    out, _ = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if "samples" not in p.parts}
    for number in (1, 2):
        _, printed, _ = unigrpo("sample", out, WORDS, "--count", 1)
        assert printed.splitlines()[-1] == f"picture: {out / 'samples' / f'{number}.png'}"
    after = {p: p.stat().st_mtime_ns for p in out.rglob("*") if "samples" not in p.parts}
    assert {p: t for p, t in after.items() if p != out} == {
        p: t for p, t in before.items() if p != out
    }


def test_sample_says_which_word_it_does_not_know(finished, unigrpo, tmp_path):
    out, _ = finished
    picture = tmp_path / "none.png"
    code, printed, err = unigrpo("sample", out, "two red zebra", "--out", picture)
    assert (code, printed) == (1, "")
    assert "the model does not know 'zebra'" in err
    assert "circle" in err
    assert not picture.exists()


def test_sample_builds_neither_rewards_nor_the_source(finished, unigrpo, tmp_path, monkeypatch):
    """A reward may be a model of its own, or a file that is gone."""
    from unigrpo_core.recipe.slots import PromptsSlot, RewardSlot

    def never(*_):
        raise AssertionError("sampling does not need it")

    monkeypatch.setattr(RewardSlot, "build", never)
    monkeypatch.setattr(PromptsSlot, "build", never)
    out, _ = finished
    code, _, err = unigrpo("sample", out, WORDS, "--count", 1, "--out", tmp_path / "a.png")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("place", ["a.xyz", "plain", "file/a.png", "folder.png"])
def test_sample_refuses_a_place_that_it_cannot_write(
    finished, unigrpo, tmp_path, place, monkeypatch
):
    out, _ = finished
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("unigrpo_core.engine.draw.with_policy", None)  # nothing is loaded for it
    code, printed, err = unigrpo("sample", out, WORDS, "--out", tmp_path / place)
    assert (code, printed) == (1, "")
    assert str(tmp_path / place) in err
    assert "a bug" not in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("prompt", ["", "  "])
def test_sample_refuses_an_empty_prompt(finished, unigrpo, tmp_path, prompt):
    code, _, err = unigrpo("sample", finished[0], prompt, "--out", tmp_path / "a.png")
    assert code == 2
    assert "the prompt is empty" in err


def test_sample_takes_a_folder_of_any_name_and_overrides(finished, unigrpo, tmp_path):
    """A run made on another device can be sampled on this one."""
    import shutil

    run = tmp_path / 'a "quoted" run\\of \u00fcs'
    shutil.copytree(finished[0], run)
    recipe = run / "recipe.toml"
    assert 'device = "cpu"' in recipe.read_text()
    recipe.write_text(recipe.read_text().replace('device = "cpu"', 'device = "cuda:999"'))
    picture = tmp_path / "a.png"
    code, _, err = unigrpo("sample", run, WORDS, "--count", 1, "--out", picture)
    assert code == 1
    assert "'cuda:999'" in err
    code, _, err = unigrpo(
        "sample", run, WORDS, "--count", 1, "--out", picture, "--set", "compute.device=cpu"
    )
    assert (code, err) == (0, "")
    assert picture.exists()


def test_sample_of_what_is_no_run(unigrpo, tmp_path):
    code, _, err = unigrpo("sample", tmp_path, WORDS)
    assert code == 2
    assert "is no run folder" in err
    code, _, err = unigrpo("sample", tmp_path, WORDS, "--count", 0)
    assert code == 2
    assert "--count is 0" in err


def test_sample_of_a_run_that_did_not_finish(unigrpo, tmp_path, finished):
    out, _ = finished
    (tmp_path / "recipe.toml").write_text((out / "recipe.toml").read_text())
    code, _, err = unigrpo("sample", tmp_path, WORDS)
    assert code == 2
    assert "has no folder final" in err
