"""PickScore on a tiny CLIP of transformers' own classes, in the published layout."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_clip
import torch
from PIL import Image
from torch import Tensor
from unigrpo_rewards import pickscore
from unigrpo_rewards.clip_pixels import read_pixels

from unigrpo_core.errors import UserError
from unigrpo_core.records import Prompt, RewardBatch

TEXTS = ("a red square", "two green circles", "", "fog " * 30)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-clip")
    tiny_clip.write(folder)
    return folder


def options(folder: Path, **others: Any) -> pickscore.PickScoreOptions:
    stated = {"checkpoint": str(folder), "processor": str(folder), "device": "cpu"}
    return pickscore.PickScoreOptions.model_validate(stated | others)


def batch(images: Tensor | None, texts: tuple[str, ...] = TEXTS) -> RewardBatch:
    prompts = tuple(Prompt(f"p{row}", text) for row, text in enumerate(texts))
    return RewardBatch(prompts, None, images, tuple(str(row) for row in range(len(texts))))


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def smooth(rows: int, height: int, width: int) -> Tensor:
    coarse = noise(rows, 3, 5, 5)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")


def pictures(images: Tensor) -> list[Image.Image]:
    """The images as flow_grpo hands them to the processor."""
    values = (images * 255).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(value.permute(1, 2, 0).numpy()) for value in values]


@pytest.fixture(scope="module")
def reward(tiny: Path) -> pickscore.PickScore:
    return pickscore.build(options(tiny))


# --- the score --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 40), (33, 50), (64, 48), (28, 28), (20, 24)])
def test_score_is_that_of_the_published_example(
    tiny: Path, reward: pickscore.PickScore, size: tuple[int, int]
) -> None:
    from transformers import CLIPModel, CLIPTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel.from_pretrained(tiny)
    tokenizer = CLIPTokenizerFast.from_pretrained(tiny)
    images = torch.cat([noise(2, 3, *size), smooth(2, *size)])
    pixels = CLIPImageProcessorPil.from_pretrained(tiny)(pictures(images), return_tensors="pt")
    tokens = tokenizer(
        list(TEXTS), padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(**tokens, **pixels)
        expected = out.logits_per_image.diag()
        got = reward.score(batch(images))
        same_pixels = model(**tokens, pixel_values=reward.pixels(images)).logits_per_image.diag()
    torch.testing.assert_close(got * 26, same_pixels, atol=1e-4, rtol=0)
    # PIL's pixels are one byte step off at ties.
    assert (got * 26 - expected).abs().max() < 0.1
    assert expected.std() > 5  # the scores tell the episodes apart by far more than that
    assert reward.range == pytest.approx((-model.logit_scale.exp().item() / 26, reward.factor))


@pytest.mark.parametrize("size", [(40, 40), (33, 50), (64, 48), (28, 28), (20, 24), (512, 512)])
def test_pixels_are_those_of_pil_but_for_ties(tiny: Path, size: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = torch.cat([noise(1, 3, *size), smooth(1, *size), torch.ones(1, 3, *size)])
    processor = CLIPImageProcessorPil.from_pretrained(tiny)
    expected = processor(pictures(images), return_tensors="pt")["pixel_values"]
    got = read_pixels(tiny / "preprocessor_config.json")(images)
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    steps = (
        (got - expected).abs() * 255 * torch.tensor(tiny_clip.PUBLISHED["image_std"])[:, None, None]
    )
    assert steps.max() < 1.001
    assert (steps > 0.001).float().mean() < 0.02


def test_scale_divides(tiny: Path, reward: pickscore.PickScore) -> None:
    plain = pickscore.build(options(tiny, scale=1.0))
    images = noise(4, 3, 40, 40)
    torch.testing.assert_close(plain.score(batch(images)), reward.score(batch(images)) * 26)
    assert plain.range == pytest.approx((-math.exp(4.6), math.exp(4.6)))


def test_batch_size_and_repeats_change_nothing(tiny: Path, reward: pickscore.PickScore) -> None:
    images, texts = noise(6, 3, 36, 30), ("fog", "a cat", "fog", "fog", "", "a cat")
    together = reward.score(batch(images, texts))
    by_ones = pickscore.build(options(tiny, batch_size=1)).score(batch(images, texts))
    torch.testing.assert_close(by_ones, together, atol=1e-6, rtol=0)
    swapped = reward.score(batch(images, ("a cat", *texts[1:])))
    assert (swapped[0] - together[0]).abs() > 1e-3  # the prompt counts
    torch.testing.assert_close(swapped[1:], together[1:], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.1), ("float16", 0.02)])
def test_low_precision_keeps_the_exact_range(
    tiny: Path, reward: pickscore.PickScore, precision: str, tolerance: float
) -> None:
    low = pickscore.build(options(tiny, precision=precision))
    score = low.score(batch(noise(4, 3, 40, 40)))
    assert score.dtype == torch.float32
    assert low.range == reward.range
    exact = reward.score(batch(noise(4, 3, 40, 40)))
    torch.testing.assert_close(score, exact, atol=tolerance, rtol=0)
    assert not torch.equal(score, exact)


def test_truncation_is_said(reward: pickscore.PickScore) -> None:
    fits, cut = "fog " * 4, "fog " * 5  # 3 tokens each and 2 at the ends: 14 and 17 of 16
    found = reward.details(batch(None, (fits, cut)))
    assert found["truncated"].tolist() == [0.0, 1.0]


def test_no_image_is_an_error(reward: pickscore.PickScore) -> None:
    with pytest.raises(ValueError, match="pickscore"):
        reward.score(batch(None))


def test_no_graph_unless_the_images_ask(reward: pickscore.PickScore) -> None:
    assert not reward.score(batch(noise(4, 3, 40, 40))).requires_grad


# --- where it comes from ----------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of the hub's client, which is offline."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(hub: Path, name: str, files: Path) -> Path:
    """The files as the hub's client keeps a downloaded repository."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(files, repository / "snapshots" / ("0" * 40))
    return repository / "snapshots" / ("0" * 40)


def test_hub_ids_are_taken_from_the_cache(
    tiny: Path, hub: Path, reward: pickscore.PickScore
) -> None:
    named = pickscore.PickScoreOptions(checkpoint="yuvalkirstain/PickScore_v1", device="cpu")
    assert [note.split(" is not there yet")[0] for note in pickscore.notes(named)] == [
        "checkpoint 'yuvalkirstain/PickScore_v1'",
        "processor 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K'",
    ]
    put(hub, named.checkpoint, tiny)
    incomplete = put(hub, named.processor, tiny) / "vocab.json"
    incomplete.rename(incomplete.with_suffix(".moved"))
    lacks = "lacks tokenizer.json (or vocab.json and merges.txt)"
    [note] = pickscore.notes(named)
    assert note.startswith(f"processor {named.processor!r} is not whole yet")
    assert f"{lacks}. A run downloads it" in note
    with pytest.raises(UserError) as caught:
        pickscore.build(named)
    assert f"processor {named.processor!r} {lacks} on the hub or, without" in str(caught.value)
    incomplete.with_suffix(".moved").rename(incomplete)
    assert not pickscore.notes(named)
    images = noise(4, 3, 40, 40)
    again = pickscore.build(named).score(batch(images))
    assert torch.equal(again, reward.score(batch(images)))


def test_without_network_the_error_says_what_to_do(hub: Path, tiny: Path) -> None:
    named = options(tiny, checkpoint="yuvalkirstain/PickScore_v1")
    with pytest.raises(
        UserError, match=r"could not be downloaded.*`hf download yuvalkirstain/Pick"
    ):
        pickscore.build(named)


@pytest.mark.parametrize(
    ("stated", "beside", "meant"),
    [
        ("owner/name", "/recipes", "owner/name"),
        ("./models/pick", "/recipes", "/recipes/models/pick"),
        ("pick", "/recipes", "/recipes/pick"),
        ("pick", "recipes", os.path.abspath("recipes/pick")),
        ("/models/pick", "/recipes", "/models/pick"),
    ],
)
def test_a_folder_counts_from_the_recipe(stated: str, beside: str, meant: str) -> None:
    made = pickscore.PickScoreOptions.model_validate(
        {"checkpoint": stated}, context={"folders": {"checkpoint": beside}}
    )
    assert made.checkpoint == meant


def test_check_says_what_is_not_there(tiny: Path, tmp_path: Path) -> None:
    gone = options(tmp_path / "gone", processor=str(tmp_path))
    checkpoint, processor = pickscore.notes(gone)
    assert checkpoint.startswith(
        f"checkpoint '{tmp_path / 'gone'}': there is no folder {tmp_path / 'gone'}; give a folder"
    )
    assert processor.startswith(
        f"processor '{tmp_path}': the folder lacks preprocessor_config.json, "
        "tokenizer.json (or vocab.json and merges.txt); give one"
    )
    assert not pickscore.notes(options(tiny))


# --- bad input --------------------------------------------------------------------------------


def edited(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without_weight(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    del weights["visual_projection.weight"]
    save_file(weights, file, {"format": "pt"})


SPOILT = {
    "no such folder": (lambda f: shutil.rmtree(f), "there is no folder"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
    "cut short": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:999]
        ),
        "cannot be loaded as a CLIP model",
    ),
    "a weight less": (
        lambda f: without_weight(f / "model.safetensors"),
        "lacks 1 weights: visual_projection.weight",
    ),
    "another model": (lambda f: edited(f / "config.json", model_type="bert"), "'bert'"),
    "another size": (
        lambda f: edited(f / "preprocessor_config.json", crop_size=14),
        "images of 14 pixels",
    ),
    "another pipeline": (
        lambda f: edited(f / "preprocessor_config.json", do_center_crop=False),
        "do_center_crop False",
    ),
    "another configuration": (
        lambda f: (f / "preprocessor_config.json").write_text("[]"),
        "not a CLIP image processor's configuration",
    ),
    "no tokenizer": (lambda f: (f / "vocab.json").write_text("{"), "the tokenizer in"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_bad_folder_is_the_users_to_mend(tiny: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(tiny, folder)
    spoil, said = SPOILT[what]
    spoil(folder)
    with pytest.raises(UserError, match=said):
        pickscore.build(options(folder))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_is_said(tiny: Path) -> None:
    with pytest.raises(UserError, match="torch finds 0 CUDA devices"):
        pickscore.build(options(tiny, device="cuda"))
