"""Text-only GRPO by the shipped recipe, in miniature."""

import json
import re
from pathlib import Path
from statistics import mean

import pytest
import tiny_lm
import torch
from transformers import AutoModelForCausalLM

from unigrpo_core.cli import main

RECIPE = "qwen3/grpo_rule"
PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "train-a-language-model.md"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_lm.write(
        tmp_path_factory.mktemp("model") / "lm", initializer_range=0.02, max_position_embeddings=256
    )


def small(model, *more):
    """Overrides that make the recipe a miniature on a CPU."""
    said = [
        *(f"policy.checkpoint={json.dumps(str(model))}", "prompts=4", "text.max_tokens=16"),
        *('compute.device="cpu"', 'compute.precision="float32"', "evaluation.every=0", *more),
    ]
    return [f"--set={item}" for item in said]


def lines(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run / name).open()]


def test_grpo_learns_to_write_digits(model, tmp_path, capsys):
    """A reward that starts near the share of digits among the bytes is beyond .25 in 60 steps; the
    adversary is a policy that never learns, whose reward stays there."""
    run = tmp_path / "run"
    more = ("steps=60", "text.lr=4e-3", "text.max_tokens=11", 'compute.checkpointing="none"')
    assert main(["run", RECIPE, "--out", str(run), *small(model, *more)]) == 0
    steps = lines(run)
    rewards = [step["reward/pattern"] for step in steps]
    assert mean(rewards[:5]) < 0.08
    assert mean(rewards[-5:]) > 0.5
    assert max(step["gap/text_max"] for step in steps) < 1e-4
    before, after = (line["pattern"] for line in lines(run, "evaluation.jsonl"))
    assert after - before > 0.25
    capsys.readouterr()
    assert main(["sample", str(run), "How many?", "--count", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("thinks: ") == 2
    assert sum(map(str.isdigit, out.split("picture")[0])) > 8
    trained = AutoModelForCausalLM.from_pretrained(run / "final")
    assert trained.dtype == torch.float32


@pytest.mark.parametrize(
    "more",
    [
        ("policy.lora_rank=2", 'compute.precision="bf16"'),
        ('compute.checkpointing="selective"', "updates.count=2", "text.regularizers=[]"),
        ('policy.open="<think>"', 'policy.close="</think>"', "policy.enable_thinking=true"),
    ],
)
def test_two_steps_of_the_recipe(model, tmp_path, more, capsys):
    run = tmp_path / "run"
    code = main(["run", RECIPE, "--out", str(run), *small(model, "steps=2", *more)])
    assert code == 0, capsys.readouterr().err
    assert all(step["text/grad_norm"] > 0 for step in lines(run))


def test_the_self_check_finds_nothing_wrong(model, capsys):
    assert main(["check", RECIPE, "--run", *small(model, "text.lr=1e-3")]) == 0
    assert "text, sampler against trainer" in capsys.readouterr().out


def test_check_says_offline_what_is_not_there_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["check", RECIPE]) == 0
    assert "hf download Qwen/Qwen3-1.7B" in capsys.readouterr().out


def test_the_page_s_recipe_runs(model, tmp_path, capsys):
    (example,) = re.findall(r"```toml example\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "mine.toml").write_text(example)
    out = ["--out", str(tmp_path / "run")]
    more = ("steps=1", "policy.lora_rank=2")
    code = main(["run", str(tmp_path / "mine.toml"), *out, *small(model, *more)])
    assert code == 0, capsys.readouterr().err
