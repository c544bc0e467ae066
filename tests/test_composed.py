"""A thinker and a painter as one policy, of tiny random models of the real classes."""

import json
import re
import tomllib
from itertools import islice
from pathlib import Path

import pytest
import tiny_clip
import tiny_lm
import tiny_painters
import torch
from tiny import Silent
from transformers import T5TokenizerFast

from unigrpo_core.catalog import load_catalog
from unigrpo_core.cli import main
from unigrpo_core.engine.clock import Clock
from unigrpo_core.engine.experience import gather
from unigrpo_core.engine.loop import Run
from unigrpo_core.engine.selfcheck import self_check
from unigrpo_core.engine.setup import build_setup
from unigrpo_core.errors import UserError
from unigrpo_core.keys import Key
from unigrpo_core.recipe import RecipeError, load_recipe
from unigrpo_core.records import Prompt, Sampling

PAIR = """\
title = "a pair"
steps = 2
prompts = 2
group = {{ fan_out = [2, 1] }}
source = {{ use = "file", path = "prompts.txt" }}
rewards = [{{ use = "brightness" }}]
advantage = {{ use = "group_norm" }}

[policy]
use = "composed"
text = {{ use = "hf_causal_lm", checkpoint = {lm} }}
image = {{ use = "{painter}", checkpoint = {pipeline}, max_text_tokens = 12, overlong = "cut" }}

[text]
lr = 1e-3
max_tokens = 6
objective = {{ use = "grpo" }}

[image]
lr = 1e-3
size = [32, 32]
objective = {{ use = "flow_grpo", ratio_norm = true }}
scheduler = {{ use = "flow_sde", steps = 4, noise_level = 0.7 }}
window = {{ use = "random", size = 2, range = [0, 3] }}
guidance = {{ use = "none" }}
regularizers = [{{ use = "velocity_mse", weight = 0.1 }}]

[evaluation]
final_prompts = 2
sheet = 0
scheduler = {{ use = "ode", steps = 3 }}
guidance = {{ use = "cfg", scale = 2.0 }}

[compute]
device = "cpu"
"""


ADAPTED = ("policy.text.lora_rank=2", "policy.image.lora_rank=2")
PAINTERS = {  # each with what its pair is trained by
    "sd3": (tiny_painters.write_sd3, ()),
    "flux": (tiny_painters.write_flux, ("image.guidance={use='cfg', scale=2.0}",)),
    "qwen_image": (tiny_painters.write_qwen_image, ("policy.image.max_text_tokens=16",)),
    "sana": (tiny_painters.write_sana, ("policy.image.instruction=false", *ADAPTED)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_lm.write(folder / "lm")
    for painter, (write, _) in PAINTERS.items():
        write(folder / painter)
    return folder


@pytest.fixture
def recipe(models, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"{n} pears\n" for n in range(16)))

    def recipe(*overrides, painter="sd3"):
        (tmp_path / "pair.toml").write_text(
            PAIR.format(
                lm=json.dumps(str(models / "lm")),
                painter=painter,
                pipeline=json.dumps(str(models / painter)),
            )
        )
        return load_recipe(tmp_path / "pair.toml", load_catalog(), overrides)

    return recipe


def trained(resolved, out):
    Run(resolved, out, Silent())()
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


@pytest.mark.parametrize("painter", PAINTERS)
def test_a_pair_trains_both_within_the_gaps(recipe, tmp_path, painter):
    """Law 3, on every step; the second follows weights that have been trained. (Beyond a twentieth
    of the clip, which is less, a run stops.)"""
    steps = trained(recipe(*PAINTERS[painter][1], painter=painter), tmp_path / "run")
    for step in steps:
        assert step["gap/text_mean"] <= 1e-5
        assert step["gap/text_max"] <= 1e-4
        assert step["gap/image_log_ratio"] <= 1e-6
        assert step["gap/trainer_twice"] <= 1e-6
        assert step["text/grad_norm"] > 0
        assert step["image/grad_norm"] > 0
    assert steps[1]["image/velocity_mse"] > 0
    assert {p.name for p in (tmp_path / "run" / "final").iterdir()} == {"text", "image"}


@pytest.mark.parametrize(
    ("overrides", "moves"),
    [
        (('train=["text"]',), {"text"}),
        (('train=["image"]',), {"image"}),
        (('episode=["draw"]', 'train=["image"]', "group.fan_out=[4]"), {"image"}),
        (ADAPTED, {"text", "image"}),
    ],
)
def test_either_side_stays_where_it_is_frozen(recipe, tmp_path, overrides, moves):
    start = build_setup(recipe("steps=1", *overrides)).policy
    before = {name: p.detach().clone() for name, p in start.root.named_parameters()}
    trained(recipe("steps=1", *overrides), tmp_path / "run")
    run = json.dumps(str(tmp_path / "run"))
    after = build_setup(recipe("steps=1", *overrides, f"start={run}")).policy
    moved = {
        name.split(".")[0]
        for name, p in after.root.named_parameters()
        if not torch.equal(p, before[name])
    }
    assert moved == moves
    if any("lora" in item for item in overrides):
        same = [n for n in before if ".lora_" not in n]
        weights = dict(after.root.named_parameters())
        assert all(torch.equal(weights[name], before[name]) for name in same)


def test_the_painter_is_told_prompt_and_thought(recipe):
    built = build_setup(recipe("policy.template='{thought} | {prompt}'")).policy
    prompts = (Prompt("a", "two pears"), Prompt("b", "one pear"))
    written, history = built.write(built.open(prompts), Sampling(4), [Key((0,)), Key((1,))])
    x_t, t = torch.randn(2, *built.latent_shape((32, 32))), torch.tensor([0.5, 0.5])
    v = built.velocity(history, x_t, t)
    alone = built.image
    texts = [f"{text} | {p.text}".strip() for text, p in zip(written.texts, prompts, strict=True)]
    expected = alone.velocity(alone.open([Prompt(t, t) for t in texts]), x_t, t)
    assert torch.equal(v, expected)
    assert torch.equal(built.velocity(built.append(built.open(prompts), written), x_t, t), v)
    turned = built.velocity(history.rows(torch.tensor([1, 0])), x_t.flip(0), t)
    torch.testing.assert_close(turned.flip(0), v, atol=1e-5, rtol=0)
    assert not torch.allclose(built.velocity(built.open(prompts), x_t, t), v, atol=1e-4)


def test_what_a_painter_cuts_of_prompt_and_thought_is_counted(recipe, models):
    resolved = recipe("policy.image.max_text_tokens=16", "text.max_tokens=8")
    setup = build_setup(resolved)
    found = gather(setup, 1, Clock(setup.device))
    written = found.rollout.segments[0]
    words = T5TokenizerFast.from_pretrained(models / "sd3" / "tokenizer_3")
    prompts = [prompt.text for prompt in found.rollout.prompts for _ in range(2)]
    told = [f"{p}\n{t}".strip() for p, t in zip(prompts, written.texts, strict=True)]
    lost = [max(0, len(words(text).input_ids) - 16) for text in told]
    assert 0 < sum(map(bool, lost)) < 4
    assert found.cut["cut_texts/tokenizer_3"] == sum(map(bool, lost)) / 4
    assert found.cut["cut_tokens/tokenizer_3"] == max(lost)
    *_, samples = islice(self_check(resolved), 3)
    share = f"{found.cut['cut_texts/tokenizer_3']:.0%}"
    assert f"; tokenizer_3 cuts {share} of the texts" in samples.figures


def test_a_thought_too_long_for_a_painter_that_refuses_ends_the_run(recipe, tmp_path):
    """The prompts alone fit, so it is found at the rollout."""
    tight = recipe(
        "policy.image.overlong='error'", "policy.image.max_text_tokens=14", "text.max_tokens=12"
    )
    with pytest.raises(UserError, match=r"tokens in tokenizer\w*, whose .* set overlong = .cut."):
        trained(tight, tmp_path / "run")


def test_a_painter_is_compiled_without_its_thinker(recipe, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))
    with pytest.raises(UserError, match="in a pair eager = true beside its checkpoint"):
        build_setup(recipe("compute.compile=true"))
    assert not compiled
    built = build_setup(recipe("compute.compile=true", "policy.text.eager=true")).policy
    assert compiled == built.image.painter.units()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("policy.image={use='hf_causal_lm', checkpoint='x'}",), "provides text, and this part"),
        (("policy.text={use='nobody'}",), "policy.text.use: no policy called 'nobody'"),
        (("policy.text.checkpoint=3",), "policy.text.checkpoint"),
        (("policy={use='hf_causal_lm', checkpoint='x', image={use='sd3', checkpoint='y'}}",),
         "'hf_causal_lm' is not made of parts"),
        (("image.guidance.use='cfg'", "image.guidance.image_scale=2.0"), "branch 'image'"),
    ],
)  # fmt: skip
def test_mistakes_of_pairs_are_told_before_anything_loads(recipe, overrides, told):
    with pytest.raises(RecipeError) as caught:
        recipe(*overrides)
    assert told in str(caught.value), str(caught.value)


def test_a_pair_without_a_part_is_told(recipe, tmp_path):
    recipe()
    file = tmp_path / "pair.toml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith('image = { use = "sd3')))
    with pytest.raises(RecipeError, match=r"made of parts: state policy\.image = \{"):
        load_recipe(file, load_catalog(), ())


def test_a_part_that_is_not_there_is_named(recipe, tmp_path):
    resolved = recipe(f"policy.text.checkpoint={json.dumps(str(tmp_path / 'gone'))}")
    assert any("policy.text" in note and "gone" in note for note in resolved.notes())
    with pytest.raises(UserError, match="gone"):
        build_setup(resolved)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    tiny_clip.write(folder := tmp_path_factory.mktemp("clip"))
    return str(folder)


def small(models, clip, painter, **more):
    """What makes a miniature of a recipe for pairs, as overrides."""
    sizes = {
        "policy.text.checkpoint": str(models / "lm"),
        "policy.image.checkpoint": str(models / painter),
        "policy.image.max_text_tokens": 12,
        "policy.text.lora_rank": 2,
        "policy.text.system_prompt": "Say what is seen.",
        "prompts": 2,
        "text.max_tokens": 6,
        "image.size": [32, 32],
        "evaluation.final_prompts": 2,
        "evaluation.scheduler.steps": 4,
        "compute.device": "cpu",
        **({"rewards.0.checkpoint": clip, "rewards.0.processor": clip} if clip else {}),
        **more,
    }
    return [f"--set={key}={json.dumps(value)}" for key, value in sizes.items()]


def test_two_steps_of_the_recipe(models, clip, tmp_path, capsys):
    """Its template, adapters, window and penalty; the sizes are those of tiny models."""
    out, steps = tmp_path / "run", {"steps": 2, "group.fan_out": [2, 1]}
    asked = small(models, clip, "sd3", **steps, **{"policy.image.lora_rank": 2})
    assert main(["run", "qwen3_sd35/unigrpo", "--out", str(out), *asked]) == 0, capsys.readouterr()
    steps = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert len(steps) == 2
    assert steps[1]["image/velocity_mse"] > 0
    for part in ("text", "image"):
        assert (out / "final" / part / "adapter_model.safetensors").exists()
    capsys.readouterr()
    assert main(["sample", str(out), "two pears", "--count", "1"]) == 0
    shown = capsys.readouterr().out
    assert "thinks: " in shown
    assert "note: tokenizer_3 cuts 100% of the texts" in shown


PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "train-a-pair.md"
EXAMPLES = re.findall(r"```toml example\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: tomllib.loads(text)["title"])
def test_the_page_s_recipes_run(models, clip, tmp_path, capsys, example):
    """Each takes a step, in miniature."""
    stated = tomllib.loads(example)
    part = stated.get("policy", {}).get("image", {})
    episode = stated.get("episode", ["think", "draw"])
    quick = {"evaluation.sheet": 0, "evaluation.final_prompts": 1, "evaluation.scheduler.steps": 1}
    more = {**quick, "steps": 1, "group.fan_out": [2, 1] if len(episode) == 2 else [4]}
    if "lora_rank" in part:
        more["policy.image.lora_rank"] = 2
    if part.get("use") == "sana":
        more["policy.image.instruction"] = False
    if "draw" not in episode:
        clip = ""
    (tmp_path / "mine.toml").write_text(example)
    out = tmp_path / "run"
    asked = small(models, clip, part.get("use", "sd3"), **more)
    code = main(["run", str(tmp_path / "mine.toml"), "--out", str(out), *asked])
    assert code == 0, capsys.readouterr().err
    (step,) = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    moved = {who for who in ("text", "image") if f"{who}/grad_norm" in step}
    assert moved == set(stated.get("train", ["text", "image"]))


def test_the_page_has_an_example_for_every_painter():
    used = {tomllib.loads(text).get("policy", {}).get("image", {}).get("use") for text in EXAMPLES}
    assert used | {"sd3"} >= set(PAINTERS)
