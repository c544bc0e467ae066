"""The recipes for BAGEL, on a folder in the published layout made from the golden weights."""

import json
import shutil

import pytest
import tiny_clip
from golden import as_published
from safetensors.torch import load_file

from unigrpo_core.cli import main
from unigrpo_core.recipe import find_recipe

RECIPES = ("bagel/unigrpo", "bagel/unigrpo_lora")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return as_published(tmp_path_factory.mktemp("published") / "BAGEL")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    tiny_clip.write(written := tmp_path_factory.mktemp("clip"))
    return written


@pytest.fixture
def here(folder, clip):
    """Overrides that point a recipe to what is on this disk."""
    return [
        f"--set=policy.checkpoint={json.dumps(str(folder))}",
        f"--set=rewards.0.checkpoint={json.dumps(str(clip))}",
        f"--set=rewards.0.processor={json.dumps(str(clip))}",
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_check_says_offline_what_is_not_there_yet(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["check", name]) == 0
    out = capsys.readouterr().out
    assert "'ByteDance-Seed/BAGEL-7B-MoT' is not there yet" in out
    assert "hf download ByteDance-Seed/BAGEL-7B-MoT" in out
    for name in ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
        assert f"'{name}' is not there yet" in out
        assert f"`hf download {name}`" in out


@pytest.mark.parametrize("name", RECIPES)
def test_check_passes_on_a_folder_in_the_published_layout(name, here, capsys):
    assert main(["check", name, *here]) == 0
    assert capsys.readouterr().out.strip().count("\n") == 0  # nothing to note


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        ({"policy.lora_image": '["wq"]'}, "policy.lora_image names 'wq', which is no linear layer"),
        ({"policy.lora_text": '["vae2llm"]'}, "policy.lora_text names 'vae2llm', which is no"),
        ("tokenizer", "has no tokenizer: none of tokenizer.json"),
        ("words", "lacks <|vision_end|>"),
        ("ae.safetensors", "the autoencoder is not there yet"),
        ("cut", "ema.safetensors is damaged"),
    ],
)
def test_check_notes_without_loading_what_would_stop_a_run(
    spoil, told, here, folder, tmp_path, capsys
):
    from unigrpo_models.bagel.layout import TOKENIZER

    spoiled = shutil.copytree(folder, tmp_path / "BAGEL")
    files = [spoiled / name for name in TOKENIZER if (spoiled / name).exists()]
    if spoil == "tokenizer":
        for file in files:
            file.unlink()
    elif spoil == "words":
        for file in files:
            file.write_text(file.read_text().replace("<|vision_end|>", "<|eyes_shut|>"))
    elif spoil == "cut":
        weights = spoiled / "ema.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif isinstance(spoil, str):
        (spoiled / spoil).unlink()
    changed = {"policy.checkpoint": json.dumps(str(spoiled))}
    changed |= spoil if isinstance(spoil, dict) else {}
    more = [f"--set={key}={value}" for key, value in changed.items()]
    assert main(["check", "bagel/unigrpo_lora", *here[1:], *more]) == 0
    out = capsys.readouterr().out
    assert "note: policy bagel: " in out
    assert told in out


@pytest.mark.parametrize(
    ("name", "precision"), [("bagel/unigrpo", "float32"), ("bagel/unigrpo_lora", "bf16")]
)
def test_two_steps_on_a_cpu(name, precision, here, folder, tmp_path, capsys):
    """Every choice is the recipe's own but for its size: steps of denoising, windows, guidance at
    evaluation, adapters, types."""
    out = tmp_path / "run"
    small = [
        *("steps=2", "prompts=2", "group.fan_out=[2,1]", "text.max_tokens=6", "text.lr=1e-3"),
        *("image.size=[64,48]", "image.lr=1e-3", "evaluation.final_prompts=2"),
        *(f'compute.precision="{precision}"', "evaluation.scheduler.steps=5"),
        *(["policy.lora_rank=2"] if "lora" in name else []),
    ]
    code = main(["run", name, "--out", str(out), *here, *(f"--set={item}" for item in small)])
    assert code == 0, capsys.readouterr().err
    steps = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert len(steps) == 2
    assert all(step["calls_per_image"] == 24 for step in steps)
    assert steps[-1]["image/velocity_mse"] > 0
    if "lora" in name:
        assert {p.name for p in (out / "final").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        return
    before, after = (load_file(where / "ema.safetensors") for where in (folder, out / "final"))
    assert before.keys() == after.keys()
    moved = {n for n in before if not before[n].float().equal(after[n].float())}
    assert any("_moe_gen" in n for n in moved)
    assert any("_moe_gen" not in n for n in moved)
    eyes = ("vit_model.", "connector.", "vit_pos_embed.", "latent_pos_embed.")
    assert not any(n.startswith(eyes) for n in moved)
    assert all(after[n].dtype == before[n].dtype for n in before if n.startswith(eyes))
    assert (out / "final" / "ae.safetensors").read_bytes() == (
        folder / "ae.safetensors"
    ).read_bytes()


def test_the_paper_s_table_stands_in_the_file():
    """Table 3 of arXiv 2603.23500; 24 and 49 network calls are 25 and 50 points."""
    import tomllib

    recipe = tomllib.loads(find_recipe("bagel/unigrpo").read_text())
    assert (recipe["prompts"], recipe["group"]["fan_out"]) == (32, [24, 1])
    assert (recipe["text"]["lr"], recipe["image"]["lr"]) == (1e-6, 3e-5)
    assert recipe["image"]["size"] == [1024, 1024]
    scheduler = recipe["image"]["scheduler"]
    assert (scheduler["steps"], scheduler["noise_level"], scheduler["shift"]) == (24, 0.8, 3.0)
    assert recipe["evaluation"]["scheduler"]["steps"] == 49
    assert recipe["image"]["window"] == {"use": "random", "size": 3, "range": [0, 5]}
    assert recipe["image"]["guidance"] == {"use": "none"}
    assert recipe["image"]["regularizers"] == [{"use": "velocity_mse", "weight": 1.5e-5}]
    radius = recipe["image"]["objective"]["clip_radius"]
    assert radius / (1024 // 8 * 1024 // 8 * 16) ** 0.5 == pytest.approx(1e-6, rel=0.01)
    assert recipe["updates"] == {"count": 2, "data": "disjoint"}
    assert recipe["text"]["regularizers"] == []
    assert (recipe["image"]["weight"], recipe["text"]["temperature"]) == (1.0, 1.0)
