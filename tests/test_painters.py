"""Policies on diffusers' image models: against the pipelines themselves, in training, and fed
wrongly. The models are tiny and random, of the real classes, saved and loaded by the real code."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import tiny
import tiny_clip
import tiny_painters
import torch
from diffusers import (
    FluxPipeline,
    QwenImagePipeline,
    SanaPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from unigrpo_models.painters import parts
from unigrpo_models.painters.folder import Shift
from unigrpo_models.template import conditioning_text

from unigrpo_core.ablation.reading import read_run
from unigrpo_core.catalog import load_catalog
from unigrpo_core.cli import main
from unigrpo_core.engine.loop import Run
from unigrpo_core.engine.rollout import Plan, sample
from unigrpo_core.engine.setup import build_setup
from unigrpo_core.errors import UserError
from unigrpo_core.keys import Key, normals
from unigrpo_core.recipe import RecipeError, load_recipe
from unigrpo_core.records import Prompt, ReplayBatch

SIZE = (24, 32)
PROMPTS = (Prompt("a", "a red cat"), Prompt("b", "red"))

RECIPE = """\
title = "a tiny painter"
steps = 2
prompts = 2
episode = ["draw"]
train = ["image"]
group = {{ fan_out = [4] }}
updates = {{ count = 1 }}
source = {{ use = "file", path = {prompts} }}
rewards = [{{ use = "brightness" }}]
advantage = {{ use = "group_norm" }}
policy = {{ use = "{kind}", checkpoint = {checkpoint}, max_text_tokens = 12 }}

[image]
lr = 1e-3
size = [24, 32]
objective = {{ use = "flow_grpo", clip_range = 1e-2 }}
scheduler = {{ use = "flow_sde", steps = 4, noise_level = 0.7 }}
window = {{ use = "random", size = 2, range = [0, 3] }}
guidance = {{ use = "none" }}

[evaluation]
prompts = 2
final_prompts = 2
sheet = 0
scheduler = {{ use = "ode", steps = 3 }}
guidance = {{ use = "none" }}

[compute]
device = "cpu"
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    at = tmp_path_factory.mktemp("painters")
    tiny_painters.write_sd3(at / "sd3")
    tiny_painters.write_flux(at / "flux")
    tiny_painters.write_flux(at / "schnell", guidance=False)
    tiny_painters.write_sana(at / "sana")
    tiny_painters.write_qwen_image(at / "qwen_image")
    return at


@pytest.fixture
def recipe(folders, tmp_path):
    """The recipe of a pipeline with overrides: ``recipe("sd3", "steps=1")``."""
    (tmp_path / "prompts.txt").write_text("".join(f"{word} cat\n" for word in "abcdefghijkl"))

    def recipe(name, *overrides):
        kind = "flux" if name == "schnell" else name
        at = {"checkpoint": folders / name, "prompts": tmp_path / "prompts.txt"}
        said = {key: json.dumps(str(path)) for key, path in at.items()}
        (tmp_path / "recipe.toml").write_text(RECIPE.format(kind=kind, **said))
        return load_recipe(tmp_path / "recipe.toml", load_catalog(), overrides)

    return recipe


@pytest.fixture
def run(recipe, tmp_path):
    """Trains; returns the run folder."""

    def run(name, *overrides, out="run"):
        Run(recipe(name, *overrides), tmp_path / out, tiny.Silent())()
        return tmp_path / out

    return run


# --- against the pipeline ---------------------------------------------------------------------


def engine_image(setup, size=SIZE):
    """What the engine draws of PROMPTS without noise, and the latents that it starts from."""
    key = Key(("figure",))
    plan = Plan(("draw",), (1,), setup.training)
    drawn = tiny.image_of(sample(setup, PROMPTS, plan, key)).images
    starts = [key.child(prompt.id, 0, "noise") for prompt in PROMPTS]
    return drawn, normals(starts, setup.image_policy.latent_shape(size), "cpu")


ONE = "image.guidance={use='none'}"
GUIDED = "image.guidance={use='cfg', scale=4.5}"
EXACT = "image.guidance={use='cfg', scale=4.5, renorm='channel_exact'}"


@pytest.mark.parametrize(
    ("guidance", "scale", "negative", "t5"),
    [
        (ONE, 1.0, "", True),
        (GUIDED, 4.5, "", True),
        (GUIDED, 4.5, "dark", True),
        (GUIDED, 4.5, "", False),
    ],
)
def test_sd3_draws_what_its_pipeline_draws(recipe, folders, guidance, scale, negative, t5):
    """On the pipeline's own grid and shift: set_timesteps(T) is the grid "diffusers"."""
    setup = build_setup(
        recipe(
            "sd3",
            guidance,
            "image.scheduler={use='flow_sde', steps=5, noise_level=0.7, grid='diffusers'}",
            f"policy.negative='{negative}'",
            f"policy.text_encoder_3={str(t5).lower()}",
        )
    )
    images, latents = engine_image(setup)
    parts = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folders / "sd3", **parts)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        [prompt.text for prompt in PROMPTS],
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=5,
        guidance_scale=scale,
        negative_prompt=[negative] * 2,
        latents=latents,
        max_sequence_length=12,
        output_type="pt",
    ).images
    assert (images - expected).abs().max() <= 1e-4
    assert images.std() > 0.05  # not all of it is cut off at black and white
    assert (images[0] - images[1]).abs().max() > 0.05


@pytest.mark.parametrize(
    ("name", "guidance", "scale", "embedded"),
    [
        ("flux", ONE, 1.0, None),
        ("flux", GUIDED, 4.5, 2.0),
        ("schnell", ONE, 1.0, None),
        ("schnell", GUIDED, 4.5, None),
    ],
)
def test_flux_draws_what_its_pipeline_draws(recipe, folders, name, guidance, scale, embedded):
    """On the pipeline's own grid and shift, which is dynamic in "flux"."""
    stated = [] if embedded is None else [f"policy.embedded_guidance={embedded}"]
    setup = build_setup(recipe(name, guidance, "image.scheduler.steps=5", *stated))
    images, latents = engine_image(setup)
    pipe = FluxPipeline.from_pretrained(folders / name)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        [prompt.text for prompt in PROMPTS],
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=5,
        guidance_scale=embedded or 3.5,
        true_cfg_scale=scale,
        negative_prompt=[""] * 2,
        latents=latents.flatten(1, 2),
        max_sequence_length=12,
        output_type="pt",
    ).images
    assert (images - expected).abs().max() <= 1e-4
    assert images.std() > 0.05
    assert (images[0] - images[1]).abs().max() > 0.02


@pytest.mark.parametrize(
    ("guidance", "scale", "negative", "instruction"),
    [(ONE, 1.0, "", True), (GUIDED, 4.5, "", True), (GUIDED, 4.5, "dark", False)],
)
def test_sana_draws_what_its_pipeline_draws(
    recipe, folders, guidance, scale, negative, instruction
):
    """On the grid and shift that the pipeline has with flow-match Euler."""
    size = (32, 64)
    setup = build_setup(
        recipe(
            "sana",
            guidance,
            "image.scheduler={use='flow_sde', steps=5, noise_level=0.7, grid='diffusers'}",
            f"policy.negative='{negative}'",
            f"policy.instruction={str(instruction).lower()}",
            "image.size=[32,64]",
        )
    )
    images, latents = engine_image(setup, size)
    pipe = SanaPipeline.from_pretrained(folders / "sana")
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        [prompt.text for prompt in PROMPTS],
        height=size[0],
        width=size[1],
        num_inference_steps=5,
        guidance_scale=scale,
        negative_prompt=negative,
        latents=latents,
        max_sequence_length=12,
        use_resolution_binning=False,
        output_type="pt",
        **({} if instruction else {"complex_human_instruction": None}),
    ).images
    assert (images - expected).abs().max() <= 1e-4
    assert images.std() > 0.05
    assert (images[0] - images[1]).abs().max() > 0.02


@pytest.mark.parametrize(
    ("guidance", "scale", "negative"), [(ONE, 1.0, ""), (EXACT, 4.5, ""), (EXACT, 4.5, "dark")]
)
def test_qwen_image_draws_what_its_pipeline_draws(recipe, folders, guidance, scale, negative):
    """On the pipeline's own shift, which is dynamic, and grid, which is stretched; guided with its
    rescaling. Texts are padded here and not there."""
    stretched = "image.scheduler={use='flow_sde', steps=5, noise_level=0.7, shift_terminal=0.02}"
    stated = (guidance, stretched, f"policy.negative='{negative}'")
    images, latents = engine_image(build_setup(recipe("qwen_image", *stated)))
    pipe = QwenImagePipeline.from_pretrained(folders / "qwen_image")
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        [prompt.text for prompt in PROMPTS],
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=5,
        true_cfg_scale=scale,
        negative_prompt=[negative] * 2,
        latents=latents.flatten(1, 2),
        output_type="pt",
    ).images
    assert (images - expected).abs().max() <= 1e-4
    assert images.std() > 0.05
    assert (images[0] - images[1]).abs().max() > 0.02


# --- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("sd3", ()),
        ("sd3", (GUIDED, "policy.lora_rank=2", "image.noise_scope='prompt'")),
        ("sd3", ("compute.replay_tokens=1", "updates.count=2")),
        ("flux", (GUIDED, "policy.lora_rank=2")),
        ("sana", (GUIDED, "policy.lora_rank=2", "policy.instruction=false")),
        ("qwen_image", (EXACT, "policy.lora_rank=2")),
    ],
)
def test_sampler_and_trainer_agree(run, name, overrides):
    """Law 3, on every step; the second follows weights that have been trained."""
    for figures in tiny.lines(run(name, *overrides)):
        assert figures["gap/image_log_ratio"] <= 1e-6  # 0 where the batches are the same
        assert figures["gap/trainer_twice"] <= 1e-6


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen_image"])
def test_bf16_with_adapters_and_recomputed_activations(run, name):
    """The engine stops a run whose gap is beyond law 3."""
    low = ("compute.precision='bf16'", "compute.checkpointing='selective'", "policy.lora_rank=2")
    at = run(name, *low, "policy.text_encoders='host'")
    assert len(tiny.lines(at)) == 2
    adapters = load_file(at / "final" / "adapter_model.safetensors")
    assert any(x.any() for key, x in adapters.items() if "lora_B" in key)
    assert {x.dtype for x in adapters.values()} == {torch.float32}


def test_gradients_do_not_depend_on_what_is_recomputed(recipe):
    found = []
    for mode in ("none", "selective", "full"):
        setup = build_setup(recipe("sd3", f"compute.checkpointing='{mode}'"))
        points = torch.randn(2, 1, 16, 12, 16, generator=torch.Generator().manual_seed(0))
        nothing = torch.zeros(2, 0, dtype=torch.int64)
        batch = ReplayBatch(
            PROMPTS, nothing, nothing.bool(), 1.0, False, points, torch.full((2, 1), 0.6), (), True
        )
        setup.policy.root(batch).velocities.square().sum().backward()
        owned = setup.policy.parameters()["image"]
        found.append({n: p.grad for n, p in owned.items() if p.grad is not None})
    assert found[0]
    for others in found[1:]:
        assert others.keys() == found[0].keys()
        assert all(torch.equal(g, others[name]) for name, g in found[0].items())


def test_whole_weights_are_saved_as_a_component(run, folders):
    """The file is one that the pipeline's own loading takes."""
    final = run("sd3") / "final"
    trained = SD3Transformer2DModel.from_pretrained(final, subfolder="transformer").state_dict()
    before = load_file(folders / "sd3/transformer/diffusion_pytorch_model.safetensors")
    assert trained.keys() == before.keys()
    assert any(not x.equal(before[name]) for name, x in trained.items())


def test_adapters_are_saved_in_the_layout_of_peft(run, recipe, folders, tmp_path):
    """PEFT puts them on the published transformer, which then computes what the policy does."""
    at = run("sd3", "policy.lora_rank=2", "image.lr=1e-2")
    setup = build_setup(recipe("sd3", f"start='{at}'", "policy.lora_rank=2"))
    policy, t = setup.image_policy, torch.tensor([0.3, 0.9])
    x_t = torch.randn(2, 16, 12, 16, generator=torch.Generator().manual_seed(0))
    told = policy.open(PROMPTS)
    expected = policy.velocity(told, x_t, t)
    base = SD3Transformer2DModel.from_pretrained(folders / "sd3", subfolder="transformer")
    adapted = PeftModel.from_pretrained(base, at / "final").eval()
    with torch.no_grad():
        found = policy.painter.velocity(
            adapted, x_t, t, policy.painter.encode(["a red cat", "red"])
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    plain = build_setup(recipe("sd3")).image_policy
    assert not torch.allclose(plain.velocity(plain.open(PROMPTS), x_t, t), expected, atol=1e-4)


def correlation(rewards):
    """Spearman's, of values with their number."""
    ranks = np.argsort(np.argsort(rewards)).astype(float)
    return float(np.corrcoef(ranks, np.arange(len(rewards)))[0, 1])


LEARNING = (
    "steps=40",
    "prompts=2",
    "group.fan_out=[6]",
    "image.size=[16,16]",
    "image.lr=4e-3",
    "image.scheduler.steps=3",
    "image.window.range=[0,2]",
    "evaluation.prompts=1",
    "evaluation.final_prompts=1",
)


@pytest.mark.parametrize("reward", ["brightness", "random"])
def test_flow_grpo_on_sd3_learns_brightness_and_nothing_from_noise(run, reward):
    steps = tiny.lines(run("sd3", *LEARNING, f"rewards=[{{use='{reward}'}}]"))
    found = correlation([step["reward"] for step in steps])
    assert found >= 0.8 if reward == "brightness" else abs(found) <= 0.4


@pytest.mark.parametrize(
    ("config", "shift"),
    [
        ({"shift": 3.0}, 3.0),
        ({}, 1.0),
        ({"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}, 3.0),
        ({"use_dynamic_shifting": True}, math.exp(0.5 + 0.65 * 768 / 3840)),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear", "max_shift": 0.5}, 0.5),
    ],
)
def test_shift_of_a_scheduler(config, shift):
    assert Shift(config)(1024) == pytest.approx(shift)


# --- texts ------------------------------------------------------------------------------------


@pytest.fixture
def policy(recipe):
    return lambda name, *overrides: build_setup(recipe(name, *overrides)).image_policy


def test_a_template_is_filled_in_once_and_as_it_stands():
    told = conditioning_text(
        "{prompt}: {thought} {0} {prompt.text} {{", "a {thought}", "no {prompt}"
    )
    assert told == "a {thought}: no {prompt} {0} {prompt.text} {{"
    assert conditioning_text("{prompt}", "") == ""


def test_the_template_is_what_is_drawn(policy):
    stated, plain = policy("sd3", "policy.template='a {prompt}'"), policy("sd3")
    found = stated.open([Prompt("x", "cat")]).condition
    assert torch.equal(found["text"], plain.painter.encode(["a cat"])["text"])
    assert stated.prompt_tokens(Prompt("x", "cat")) == plain.prompt_tokens(Prompt("x", "a cat"))


@pytest.mark.parametrize("template", ["cats", "{prompt} {thought}"])
def test_a_template_that_would_lose_a_text_is_refused(recipe, template):
    with pytest.raises(RecipeError, match="nothing is thought"):
        recipe("sd3", f"policy.template='{template}'")


@pytest.mark.parametrize("name", ["sd3", "flux", "sana", "qwen_image"])
def test_a_text_is_read_once_until_it_is_forgotten(policy, name):
    painter = policy(name, "policy.kept_texts=2").painter
    read, told = painter.read, []
    painter.read = lambda text: told.append(text) or read(text)
    first = painter.encode(["a cat", "red", "a cat"])
    assert told == ["a cat", "red"]
    assert all(torch.equal(x[0], x[2]) and not torch.equal(x[0], x[1]) for x in first.values())
    painter.encode(["red", "a cat"])
    assert told == ["a cat", "red"]
    painter.encode(["a dog"])
    again = painter.encode(["red", "a cat"])
    assert told == ["a cat", "red", "a dog", "red"]
    assert all(torch.equal(x, first[key][[1, 0]]) for key, x in again.items())


@pytest.mark.parametrize(
    ("overrides", "text", "said", "lost"),
    [
        ((), "a " * 20, "takes 22 tokens in tokenizer, whose encoder takes 16", (6, 6, 9)),
        (
            ("policy.max_text_tokens=4",),
            "a b c d",
            "in tokenizer_3, whose encoder takes 4",
            (0, 0, 4),
        ),
    ],
)
def test_a_text_too_long_is_counted_and_refused_or_cut(policy, overrides, text, said, lost):
    lost = dict(zip(("tokenizer", "tokenizer_2", "tokenizer_3"), lost, strict=True))
    with pytest.raises(UserError, match=said):
        policy("sd3", *overrides).prompt_tokens(Prompt("x", text))
    with pytest.raises(UserError, match=said):
        policy("sd3", *overrides, f"policy.negative='{text}'")
    assert policy("sd3", *overrides).cut_tokens(Prompt("x", text)) == {}
    cut = policy("sd3", *overrides, "policy.overlong='cut'")
    assert cut.prompt_tokens(Prompt("x", text)) <= 16
    assert len(cut.open([Prompt("x", text)])) == 1
    assert cut.cut_tokens(Prompt("x", text)) == lost
    assert cut.cut_tokens(Prompt("x", "a")) == dict.fromkeys(lost, 0)


def test_a_negative_text_is_never_cut(policy):
    said = "policy.negative is longer than tokenizer_3 reads, .* its last 9 tokens"
    with pytest.raises(UserError, match=said):
        policy("sd3", "policy.overlong='cut'", f"policy.negative='{'a ' * 20}'")


def test_prompts_too_long_are_counted_before_a_run_folder_exists(recipe, tmp_path):
    resolved = recipe("sd3", "steps=6")
    lines = ["b " * 20, "c " * 30, *(f"{word} cat" for word in "abcdefghij")]
    (tmp_path / "prompts.txt").write_text("".join(f"{line}\n" for line in lines))
    said = r"2 of the 12 different prompts cannot be used; the first: a text takes \d+ tokens in"
    with pytest.raises(UserError, match=said):
        Run(resolved, tmp_path / "run", tiny.Silent())
    assert not (tmp_path / "run").exists()


def test_cut_prompts_are_counted_before_and_during_a_run(recipe, tmp_path, capsys):
    """Of the first prompt the CLIPs read all of 14 tokens and T5 12 of 24, of the second 16 of 18
    and 12 of 32; of the held-out ones T5 reads all of one, and 12 of 37."""
    recipe("sd3")
    lines = ["a b c d e f g h i j k l", "a b c d e f g h i j k l m n o p", *"abcdefghij"]
    (tmp_path / "prompts.txt").write_text("".join(f"{line}\n" for line in lines))
    (held_out := tmp_path / "held-out.txt").write_text("x\n" + "x y z " * 6)
    changes = {"prompts": 12, "group.fan_out": [2], "steps": 1, "policy.overlong": "cut"}
    changes["source.held_out_path"] = str(held_out)
    asked = [f"--set={key}={json.dumps(value)}" for key, value in changes.items()]
    file, out = str(tmp_path / "recipe.toml"), tmp_path / "run"
    assert main(["run", file, "--out", str(out), *asked]) == 0, capsys.readouterr()
    shown = " ".join(capsys.readouterr().out.split())
    for said in (
        "tokenizer leaves out the end of 2 of the 14 different prompts, at most 4 tokens of one",
        "tokenizer_3 leaves out the end of 3 of the 14 different prompts, at most 25 tokens of one",
        "tokenizer cuts 8% of the texts tokenizer_2 cuts 8% of the texts tokenizer_3 cuts 17% of",
        "tokenizer_3 cuts 50% of the texts step 1/1",
    ):
        assert said in shown, shown
    [step] = tiny.lines(out)
    counted = {"tokenizer": (1, 2), "tokenizer_2": (1, 2), "tokenizer_3": (2, 20)}
    for name, (texts, tokens) in counted.items():
        assert step[f"cut_texts/{name}"] == pytest.approx(texts / 12)
        assert step[f"cut_tokens/{name}"] == tokens
    for line in (out / "evaluation.jsonl").open():
        assert json.loads(line)["cut_texts/tokenizer_3"] == 0.5
    assert read_run(out).metric_names == ("brightness",)


def test_padding_of_a_text_changes_nothing_beyond_rounding(policy):
    """Velocities at lengths of 12 and 40, of which 11 and 8 are the texts'."""
    short, long = (
        policy("qwen_image", f"policy.max_text_tokens={tokens}").painter for tokens in (12, 40)
    )
    texts = ["a red cat", "red"]
    assert [short.text_tokens(text) for text in texts] == [11, 8]
    x_t = torch.randn(2, 6, 8, 16, generator=torch.Generator().manual_seed(0))
    found = [
        painter.velocity(painter.network, x_t, torch.tensor([0.3, 0.9]), painter.encode(texts))
        for painter in (short, long)
    ]
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)
    assert (found[0][0] - found[0][1]).abs().max() > 0.1


def test_a_text_in_a_template_is_counted_and_cut_without_it(policy, folders):
    """The 34 tokens before a text do not count, the 5 that close it do; the message shows the text.
    What is cut is what the pipeline cuts."""
    long = Prompt("x", "abcdefghijklmno")
    stated = "a text takes 20 tokens in tokenizer, whose encoder takes 12: 'abcdefghijklmno'"
    with pytest.raises(UserError, match=stated):
        policy("qwen_image").prompt_tokens(long)
    cut = policy("qwen_image", "policy.overlong='cut'")
    assert cut.prompt_tokens(long) == 12
    found = cut.painter.encode([long.text])
    pipe = QwenImagePipeline.from_pretrained(folders / "qwen_image")
    with torch.no_grad():
        expected, mask = pipe.encode_prompt(long.text, max_sequence_length=12)
    assert mask is None
    assert found["mask"].all()
    torch.testing.assert_close(found["text"], expected, atol=1e-6, rtol=1e-5)


# --- bad input --------------------------------------------------------------------------------


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(folder, name):
    path = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({key: x for key, x in state.items() if key != name}, path, {"format": "pt"})


FAULTS = {
    "no index": (lambda at: remove(at / "model_index.json"), "lacks model_index.json"),
    "another pipeline": (
        lambda at: edited(at / "model_index.json", _class_name="StableDiffusionPipeline"),
        "is a StableDiffusionPipeline, which this policy is not for",
    ),
    "another network": (
        lambda at: edited(at / "model_index.json", transformer=["diffusers", "PixArt"]),
        "its transformer is a PixArt",
    ),
    "no component": (lambda at: remove(at / "vae"), "lacks vae; a StableDiffusion3Pipeline needs"),
    "no encoder": (
        lambda at: edited(at / "model_index.json", text_encoder_3=[None, None]),
        "lacks text_encoder_3",
    ),
    "no flow": (
        lambda at: edited(at / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler"),
        "its scheduler is a DDIMScheduler, which is not flow-match",
    ),
    "a bent grid": (
        lambda at: edited(at / "scheduler" / "scheduler_config.json", use_karras_sigmas=True),
        "its scheduler has use_karras_sigmas",
    ),
    "no scheduler": (
        lambda at: remove(at / "scheduler" / "scheduler_config.json"),
        "lacks scheduler/scheduler_config.json",
    ),
    "no weights": (
        lambda at: remove(at / "transformer" / "diffusion_pytorch_model.safetensors"),
        "transformer cannot be loaded as SD3Transformer2DModel",
    ),
    "fewer weights": (
        lambda at: without(at / "transformer", "proj_out.bias"),
        "is no whole SD3Transformer2DModel: missing or misshapen are proj_out.bias",
    ),
    "other weights": (
        lambda at: edited(at / "transformer" / "config.json", pooled_projection_dim=48),
        "transformer",
    ),
    "cut off": (
        lambda at: (at / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no"),
        "vae cannot be loaded as AutoencoderKL",
    ),
    "no words": (
        lambda at: [remove(path) for path in (at / "tokenizer").iterdir()],
        "tokenizer cannot be loaded as CLIPTokenizer",
    ),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_folder_that_does_not_fit_is_refused_before_anything_runs(
    recipe, folders, tmp_path, name
):
    harm, said = FAULTS[name]
    shutil.copytree(folders / "sd3", at := tmp_path / "harmed")
    harm(at)
    with pytest.raises(UserError, match=said):
        build_setup(recipe("sd3", f"policy.checkpoint='{at}'"))


@pytest.mark.parametrize(
    ("name", "override", "said"),
    [
        ("sd3", "policy.checkpoint='nowhere'", "there is no folder"),
        ("sd3", "image.size=[30,24]", "image height 30: this model draws multiples of 4 pixels up"),
        ("sd3", "image.size=[24,128]", "image width 128: .* up to 64"),
        ("flux", "image.size=[24,30]", "image width 30: this model draws multiples of 4 pixels"),
        ("schnell", "policy.embedded_guidance=2.0", "takes none"),
        (
            "flux",
            "policy.lora_rank=2\npolicy.lora_image=['q_proj']",
            "no linear layer of the image",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(recipe, name, override, said):
    with pytest.raises(UserError, match=said):
        build_setup(recipe(name, *override.split("\n")))


def test_a_distilled_qwen_image_is_refused(recipe, tmp_path):
    at = tiny_painters.write_qwen_image(tmp_path / "distilled", guidance_embeds=True)
    with pytest.raises(UserError, match="its transformer takes a guidance as an input"):
        build_setup(recipe("qwen_image", f"policy.checkpoint='{at}'"))


def test_check_says_that_a_model_stretches_its_times(recipe, capsys):
    """A scheduler that ends elsewhere is the recipe's choice, so it is said and not refused."""
    for name in ("flux", "qwen_image"):
        resolved = recipe(name)
        assert bool(resolved.notes()) == (name == "qwen_image")
    (note,) = resolved.notes()
    assert note == (
        "policy qwen_image: the model's own times are stretched to end at 0.02 before 0: the "
        "recipe's schedulers do so with shift_terminal = 0.02, and only with it"
    )


def test_diffusers_is_named_when_it_is_missing(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r'pip install "unigrpo\[diffusers\]"'):
        build_setup(recipe("sd3"))


def test_a_diffusers_that_is_too_old_is_named(recipe, monkeypatch):
    monkeypatch.setattr(parts, "version", lambda _: "0.36.0")
    said = 'needs diffusers 0.37 or later, and 0.36.0 is installed: pip install "diffusers>=0.37"'
    with pytest.raises(UserError, match=said):
        build_setup(recipe("qwen_image"))


def test_weights_of_another_kind_are_not_loaded(policy, tmp_path):
    whole, adapted, sampled = (
        policy("sd3", *more) for more in ((), ["policy.lora_rank=2"], ["train=[]", "steps=0"])
    )
    whole.save(tmp_path / "whole")
    adapted.save(tmp_path / "adapted")
    with pytest.raises(UserError, match="holds adapters, not whole weights"):
        whole.load(tmp_path / "adapted")
    with pytest.raises(UserError, match="its run trained without adapters"):
        adapted.load(tmp_path / "whole")
    with pytest.raises(UserError, match=r"has no diffusion_pytorch_model\.safetensors"):
        whole.load(tmp_path)
    with pytest.raises(UserError, match="is of another model"):
        policy("flux").load(tmp_path / "whole")
    sampled.load(tmp_path / "adapted")  # a policy that is not trained takes either
    assert any(".lora_A." in name for name, _ in sampled.root.named_parameters())
    assert not any(parameter.requires_grad for parameter in sampled.root.parameters())


# --- shipped recipes --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    tiny_clip.write(written := tmp_path_factory.mktemp("clip"))
    return written


@pytest.mark.parametrize("name", ["sd35/flow_grpo_pickscore", "sd35/no_cfg_mse"])
def test_shipped_recipes_run_two_steps(name, folders, clip, tmp_path, capsys):
    """Every choice is the recipe's own but for its size."""
    small = [
        *("steps=2", "prompts=2", "group.fan_out=[2]", "image.size=[16,24]", "policy.lora_rank=2"),
        *("policy.max_text_tokens=12", "evaluation.scheduler.steps=4", "evaluation.sheet=0"),
        *("evaluation.prompts=2", "evaluation.final_prompts=2", "compute.device='cpu'"),
        f"policy.checkpoint={json.dumps(str(folders / 'sd3'))}",
        f"rewards.0.checkpoint={json.dumps(str(clip))}",
        f"rewards.0.processor={json.dumps(str(clip))}",
        "compute.precision='float32'",
    ]
    out = tmp_path / "run"
    code = main(["run", name, "--out", str(out), *(f"--set={item}" for item in small)])
    assert code == 0, capsys.readouterr().err
    steps = tiny.lines(out)
    assert len(steps) == 2
    assert all(step["calls_per_image"] == (20 if "flow" in name else 10) for step in steps)
    assert steps[-1]["image/latent_kl" if "flow" in name else "image/velocity_mse"] > 0
    assert {path.name for path in (out / "final").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_check_says_offline_what_is_not_there_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["check", "sd35/no_cfg_mse"]) == 0
    assert "'stabilityai/stable-diffusion-3.5-medium' is not there yet" in capsys.readouterr().out


def test_a_download_cut_off_is_not_taken_for_whole(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository = tmp_path / "models--stabilityai--stable-diffusion-3.5-medium"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    at = shutil.copytree(folders / "sd3", repository / "snapshots" / "abc")
    assert main(["check", "sd35/no_cfg_mse"]) == 0
    assert "policy sd3" not in capsys.readouterr().out
    remove(at / "transformer" / "diffusion_pytorch_model.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (at / "text_encoder_3" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["check", "sd35/no_cfg_mse"]) == 0
    said = capsys.readouterr().out
    assert "text_encoder_3/model-00001-of-00002.safetensors, transformer/diffusion" in said
    assert main(["check", "sd35/no_cfg_mse", f"--set=policy.checkpoint='{at}'"]) == 0
    assert f"not there yet: {at / 'transformer' / 'diffusion_pytorch_model.saf'}" in (
        capsys.readouterr().out.replace("\n", "")
    )
