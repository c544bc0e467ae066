"""Policies on diffusers' image models: against the pipelines themselves, in training, and fed
wrongly. The models are tiny and random, of the real classes, saved and loaded by the real code."""

import json

import numpy as np
import pytest
import tiny
import tiny_painters
import torch
from diffusers import FluxPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import PeftModel
from safetensors.torch import load_file

from unigrpo_core.catalog import load_catalog
from unigrpo_core.engine.loop import Run
from unigrpo_core.engine.rollout import Plan, sample
from unigrpo_core.engine.setup import build_setup
from unigrpo_core.keys import Key, normals
from unigrpo_core.recipe import load_recipe
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
    return at


@pytest.fixture
def recipe(folders, tmp_path):
    """The recipe of a pipeline with overrides: ``recipe("sd3", "steps=1")``."""
    (tmp_path / "prompts.txt").write_text("".join(f"{word} cat\n" for word in "abcdefghijkl"))

    def recipe(name, *overrides):
        kind = "sd3" if name == "sd3" else "flux"
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


def engine_image(setup):
    """What the engine draws of PROMPTS without noise, and the latents that it starts from."""
    key = Key(("figure",))
    plan = Plan(("draw",), (1,), setup.training)
    drawn = tiny.image_of(sample(setup, PROMPTS, plan, key)).images
    starts = [key.child(prompt.id, 0, "noise") for prompt in PROMPTS]
    return drawn, normals(starts, setup.image_policy.latent_shape(SIZE), "cpu")


ONE = "image.guidance={use='none'}"
GUIDED = "image.guidance={use='cfg', scale=4.5}"


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


# --- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("sd3", ()),
        ("sd3", (GUIDED, "policy.lora_rank=2", "image.noise_scope='prompt'")),
        ("sd3", ("compute.replay_tokens=1", "updates.count=2")),
        ("flux", (GUIDED, "policy.lora_rank=2")),
    ],
)
def test_sampler_and_trainer_agree(run, name, overrides):
    """Law 3, on every step; the second follows weights that have been trained."""
    for figures in tiny.lines(run(name, *overrides)):
        assert figures["gap/image_log_ratio"] <= 1e-6  # 0 where the batches are the same
        assert figures["gap/trainer_twice"] <= 1e-6


@pytest.mark.parametrize("name", ["sd3", "flux"])
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
    "group.fan_out=[8]",
    "image.size=[16,16]",
    "image.lr=4e-3",
    "evaluation.prompts=1",
    "evaluation.final_prompts=1",
)


@pytest.mark.parametrize("reward", ["brightness", "random"])
def test_flow_grpo_on_sd3_learns_brightness_and_nothing_from_noise(run, reward):
    steps = tiny.lines(run("sd3", *LEARNING, f"rewards=[{{use='{reward}'}}]"))
    found = correlation([step["reward"] for step in steps])
    assert found >= 0.8 if reward == "brightness" else abs(found) <= 0.4
