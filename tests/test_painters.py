"""Policies on diffusers' image models: against the pipelines themselves, in training, and fed
wrongly. The models are tiny and random, of the real classes, saved and loaded by the real code."""

import json

import pytest
import tiny
import tiny_painters
from diffusers import FluxPipeline, StableDiffusion3Pipeline

from unigrpo_core.catalog import load_catalog
from unigrpo_core.engine.loop import Run
from unigrpo_core.engine.rollout import Plan, sample
from unigrpo_core.engine.setup import build_setup
from unigrpo_core.keys import Key, normals
from unigrpo_core.recipe import load_recipe
from unigrpo_core.records import Prompt

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
