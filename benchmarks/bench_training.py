"""The parts of a training step, on the embedded model in the setting of ``no_cfg_mse``: 12 prompts
x 12 episodes, 8 denoising steps of which 3 are trained. Run with ``make bench``.
"""

import pytest
import torch

from unigrpo_core.catalog import load_catalog
from unigrpo_core.engine.rollout import Plan, sample
from unigrpo_core.engine.scoring import advantages, episodes, score
from unigrpo_core.engine.setup import build_setup
from unigrpo_core.engine.trainset import build_train_set
from unigrpo_core.engine.update import Updater
from unigrpo_core.keys import Key, normals
from unigrpo_core.recipe import find_recipe, load_recipe

TRAINED = (0, 1, 2)
KEY = Key(("benchmark",))
ONE_UPDATE = (
    "updates.count=1",
    "image.regularizers=[]",
    # So small that no weight changes: every round finds the sampler's own weights, which the
    # gap check insists on.
    "text.lr=1e-30",
    "image.lr=1e-30",
)
DRAWING_ONLY = ('episode=["draw"]', 'train=["image"]', "group.fan_out=[12]")


def setup_of(*overrides):
    return build_setup(load_recipe(find_recipe("no_cfg_mse"), load_catalog(), overrides))


@pytest.fixture(scope="module")
def setup():
    return setup_of(*ONE_UPDATE)


@pytest.fixture(scope="module")
def drawing():
    return setup_of(*DRAWING_ONLY)


def prompts_of(setup):
    return setup.source.train(0, 0, setup.recipe.prompts)


def bench_text_rollout(benchmark, setup):
    """144 thoughts of at most 13 tokens."""
    rollout = benchmark(sample, setup, prompts_of(setup), Plan(("think",), (12,), None), KEY)
    assert len(rollout.segments[0].texts) == 144


def bench_image_rollout(benchmark, drawing):
    """144 images of 8 steps, without a thought."""
    plan = Plan(("draw",), (12,), drawing.training, TRAINED)
    rollout = benchmark(sample, drawing, prompts_of(drawing), plan, KEY)
    assert rollout.segments[0].images.shape == (144, 3, 24, 24)


def bench_update(benchmark, setup):
    """One replay of 144 thoughts and 432 points, forward and backward, and one step."""
    plan = Plan(setup.recipe.episode, setup.recipe.group.fan_out, setup.training, TRAINED)
    rollout = sample(setup, prompts_of(setup), plan, KEY)
    scores = score(setup.rewards, episodes(rollout, "benchmark"), details=False)
    found = tuple(advantages(setup, rollout, scores, level) for level in (0, 1))
    data = build_train_set(setup, rollout, found, scores.total, KEY)
    metrics = benchmark(Updater(setup), data)
    assert metrics["text/grad_norm"] > 0
    assert metrics["image/grad_norm"] > 0


@pytest.mark.parametrize("elements", [(6, 6, 48), (4096, 64)], ids=["24px", "1024px"])
def bench_scheduler_step(benchmark, setup, elements):
    """The kernel of one step for 8 images: of the embedded model, and of BAGEL's size."""
    x_t = normals([KEY.child("x", row) for row in range(8)], elements, "cpu")[:, None]
    v = normals([KEY.child("v", row) for row in range(8)], elements, "cpu")[:, None]
    t, t_next, noise_level = (torch.full((8, 1), value) for value in (0.9, 0.8, 0.8))
    step = setup.training.scheduler.transition
    transition = benchmark(step, v, x_t, t, t_next, noise_level)
    assert transition.mean.shape == x_t.shape
