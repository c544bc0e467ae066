"""The learned reward of the embedded world: better than chance, worse than the verifier."""

import subprocess
import sys
from copy import deepcopy
from hashlib import sha256
from json import dumps, loads
from pathlib import Path

import numpy as np
import pytest
import torch
import unigrpo_board
from safetensors.torch import load_file, save_file
from unigrpo_board.make_scorer import contrast, dirty, judge, pairs
from unigrpo_board.scene import Scene, draw_scene, lay_out, say
from unigrpo_board.scorer import PROVIDER, ScorerOptions
from unigrpo_board.scorer_network import ScorerNetwork, load
from unigrpo_board.verifier import draw, grid

from unigrpo_core.errors import UserError
from unigrpo_core.keys import Key
from unigrpo_core.records import Prompt, RewardBatch

FOLDER = Path(unigrpo_board.__file__).parent / "scorer"
SCENE = Scene(2, ("red", "circle"), "left", ("blue", "square"))


@pytest.fixture(scope="module")
def reward():
    return PROVIDER.build(ScorerOptions())


@pytest.fixture
def copy(tmp_path):
    """A copy of the embedded scorer, to be damaged."""
    for file in FOLDER.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def rng(*name):
    return Key(("scorer", *name)).generator()


def batch(texts, images):
    return RewardBatch(
        prompts=tuple(Prompt(str(row), text) for row, text in enumerate(texts)),
        thoughts=None,
        images=images,
        keys=tuple(map(str, range(len(texts)))),
    )


def pictures(scenes, generator):
    return torch.from_numpy(draw(np.stack([grid(lay_out(s, generator)) for s in scenes])))


def refused(folder):
    with pytest.raises(UserError) as caught:
        PROVIDER.build(ScorerOptions(checkpoint=str(folder)))
    return str(caught.value)


# --- what it says -----------------------------------------------------------------------------


def test_the_right_picture_is_ranked_above_a_wrong_one_but_not_always(reward):
    generator = rng("ranks")
    scenes = [draw_scene(generator, lambda scene: scene.held_out) for _ in range(300)]
    texts = [say(scene, generator) for scene in scenes]
    images = pictures(scenes, generator)
    right = reward.score(batch(texts, images))
    wrong = reward.score(batch(texts, images.roll(1, 0)))
    assert (right > wrong).float().mean() > 0.95
    assert right.mean() > wrong.mean() + 0.1


def test_it_is_no_perfect_judge_of_near_misses(reward):
    """As its page says; the figures are measured anew."""
    made = loads((FOLDER / "made.json").read_text())
    measured = judge(reward.network)
    for name, value in measured.items():
        assert value == pytest.approx(made[name], abs=0.005)
    assert 0.8 < measured["pair_accuracy"] < 0.95
    assert 0.5 < measured["correlation"] < 0.9


def test_the_score_is_the_cosine_moved_into_0_to_1(reward):
    images = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    texts = ["two red circle", "one blue square", "half of four green triangle", "a"]
    seen = reward.network.encode_image(images).double()
    said = reward.network.encode_text(reward.network.count(texts)).double()
    cosine = (seen * said).sum(1) / (seen.norm(dim=1) * said.norm(dim=1))
    torch.testing.assert_close(reward.score(batch(texts, images)).double(), (1 + cosine) / 2)


def test_word_order_is_not_read(reward):
    """One way to be wrong: who stands left of whom is lost between two kinds."""
    images = pictures([SCENE], rng("order"))
    one = reward.score(batch(["a red circle left of a blue square"], images))
    other = reward.score(batch(["a blue square left of a red circle"], images))
    assert torch.equal(one, other)


def test_the_gradient_of_a_score_reaches_its_image_and_no_weight(reward):
    """Compared with differences in float64, closer together than the network's kinks."""
    generator = torch.Generator().manual_seed(1)
    images, way = (torch.rand(2, 3, 24, 24, generator=generator) for _ in range(2))
    texts = ["one red circle", "a blue square"]
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(batch(texts, images))[0], images)
    exact = deepcopy(reward.network).double()
    said = exact.encode_text(exact.count(texts).double())
    seen = [exact.encode_image(images.detach() + step * way.double()) for step in (1e-6, -1e-6)]
    ahead, behind = (torch.cosine_similarity(one, said) for one in seen)
    slope = ((ahead - behind) / 4e-6)[0].item()
    assert abs(slope) > 1e-2
    assert (gradient * way).sum().item() == pytest.approx(slope, rel=1e-3)
    assert not gradient[1].any()
    assert PROVIDER.differentiable
    assert not any(parameter.requires_grad for parameter in reward.network.parameters())


# --- what it refuses --------------------------------------------------------------------------


def test_an_episode_without_an_image(reward):
    with pytest.raises(UserError, match="board_scorer reads images, but the episode draws none"):
        reward.score(batch(["one red circle"], None))


def test_an_image_of_another_size(reward):
    with pytest.raises(UserError, match=r"24 x 24 pixels, but image.size is \[8, 12\]"):
        reward.score(batch(["one red circle"], torch.zeros(1, 3, 8, 12)))


def test_a_word_of_another_world(reward):
    with pytest.raises(UserError, match=r"does not know 'cat', in the prompt 'a red cat'.*board"):
        reward.score(batch(["a red cat"], torch.zeros(1, 3, 24, 24)))


@pytest.mark.parametrize("name", ["config.json", "scorer.safetensors"])
def test_a_file_is_missing(copy, name):
    (copy / name).unlink()
    assert f"{copy} is no scorer: it has no {name}" in refused(copy)


def test_no_folder_at_all(tmp_path):
    folder = tmp_path / "nowhere"
    assert f"there is no folder {folder}" in refused(folder)
    [note] = PROVIDER.notes(ScorerOptions(checkpoint=str(folder)))
    assert f"there is no folder {folder}" in note
    assert not PROVIDER.notes(ScorerOptions())


def test_half_of_the_weights(copy):
    weights = copy / "scorer.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert f"{weights} is damaged" in refused(copy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("text.0.weight"), "Missing key"),
        (lambda state: state.update(extra=torch.zeros(1)), "Unexpected key"),
        (lambda state: state.update({"text.0.bias": torch.zeros(3)}), "size mismatch"),
        (lambda state: state["text.0.bias"].fill_(torch.nan), "not finite"),
    ],
)
def test_weights_of_another_network(copy, change, said):
    state = load_file(copy / "scorer.safetensors")
    change(state)
    save_file(state, copy / "scorer.safetensors")
    assert said in refused(copy)
    assert "make_scorer" in refused(copy)


@pytest.mark.parametrize("text", ["{", '{"words": []}', "[]"])
def test_a_config_that_says_something_else(copy, text):
    (copy / "config.json").write_text(text)
    assert f"{copy / 'config.json'} is damaged" in refused(copy)


def test_a_config_with_a_key_too_many(copy):
    config = loads((copy / "config.json").read_text()) | {"depth": 3}
    (copy / "config.json").write_text(dumps(config))
    assert "depth" in refused(copy)


# --- how it was made --------------------------------------------------------------------------


def test_the_embedded_scorer_is_the_one_that_was_made(reward):
    made = loads((FOLDER / "made.json").read_text())
    weights = (FOLDER / "scorer.safetensors").read_bytes()
    assert sha256(weights).hexdigest() == made["sha256"]
    assert len(weights) < 1_000_000
    assert sum(p.numel() for p in reward.network.parameters()) == made["parameters"]


def test_the_pairs_are_of_training_prompts_and_noisy():
    images, texts = pairs(rng("pairs"), 200)
    assert images.shape == (200, 3, 24, 24)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    again, same = pairs(rng("pairs"), 200)
    assert torch.equal(again, images)
    assert same == texts
    clean = pictures([SCENE] * 200, rng("clean"))
    assert 0.03 < (dirty(clean.numpy(), rng("dirt")) - clean).square().mean().sqrt() < 0.15


def test_the_contrast_teaches():
    """A fresh network learns some of its own batch in a few steps."""
    network = ScorerNetwork(load(FOLDER).config)
    images, texts = pairs(rng("teaches"), 32)
    counts = network.count(texts)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    first = contrast(network, images, counts).item()
    assert first == pytest.approx(np.log(32), abs=0.3)
    for _ in range(20):
        loss = contrast(network, images, counts)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert loss.item() < first - 0.5


def test_the_script_says_how_to_install_what_measures_it(tmp_path):
    """Before it trains, so that nothing is lost."""
    blocked = (
        "import sys; sys.modules['clip_benchmark'] = None; "
        "sys.argv = ['make_scorer', sys.argv[1]]; "
        "from unigrpo_board.make_scorer import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocked, tmp_path / "new"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "pip install --no-deps clip-benchmark tqdm" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()
