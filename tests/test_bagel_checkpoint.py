"""Checkpoints in the published layout: what is read, refused, kept and written; and where one is
looked for."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from golden import DATA, SPECIAL, as_published, write_byte_tokenizer
from huggingface_hub import errors, snapshot_download
from safetensors.torch import load_file, save, save_file
from tiny import catalog, recipe
from unigrpo_models.bagel.config import BagelConfig
from unigrpo_models.bagel.layout import FILES
from unigrpo_models.bagel.options import BagelOptions
from unigrpo_models.bagel.policy import load_bagel
from unigrpo_models.bagel.provider import PROVIDER, notes
from unigrpo_models.bagel.tokens import Codec

from unigrpo_core.errors import UserError
from unigrpo_core.plugin import Placement, local_folder
from unigrpo_core.recipe import load_recipe

CPU = torch.device("cpu")
TABLE = "latent_pos_embed.pos_embed"
EYE = {
    "connector.fc1.bias": torch.arange(5).to(torch.float16),
    "vit_model.vision_model.post_layernorm.weight": torch.randn(3, 4).bfloat16(),
    "vit_pos_embed.pos_embed": torch.randn(6, 2),
}


def place(compute=torch.float32, *train):
    return Placement(CPU, compute, frozenset(train))


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    return as_published(tmp_path_factory.mktemp("golden") / "BAGEL-tiny")


@pytest.fixture
def folder(tmp_path, checkpoint):
    """A copy of the tiny checkpoint in bfloat16, with parts that look at images and an
    autoencoder; the weights are exact."""
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    state = load_file(folder / "ema.safetensors")
    state = {name: x if name == TABLE else x.bfloat16() for name, x in state.items()}
    save_file(state | EYE, folder / "ema.safetensors")
    (folder / "ae.safetensors").write_bytes(b"an autoencoder")
    return folder


def changed(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(folder):
    with pytest.raises(UserError) as caught:
        load_bagel(folder, "", place())
    return str(caught.value)


# --- the published layout ---------------------------------------------------------------------


def test_the_golden_folder_is_read(golden):
    config = BagelConfig.read(golden)
    assert (config.latent.space, config.latent.patch, config.latent.max_size) == ("flux", 2, 8)
    policy = load_bagel(golden, "", place())
    codec = policy.codec
    assert (codec.bos, codec.eos, codec.image_start, codec.image_end) == (290, 291, 292, 293)
    assert codec.decode(codec.wrap("a lemon, ça va")[1:]) == "a lemon, ça va"
    expected = load_file(DATA / "weights.safetensors")
    state = policy.network.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(x, expected[name].float()) for name, x in state.items())


def test_what_is_saved_of_the_golden_folder_is_what_it_was(golden, tmp_path):
    """Every other file byte for byte, and every tensor; trained ones are float32."""
    policy = load_bagel(golden, "", place(torch.float32, "image"))
    policy.save(tmp_path)
    names = {file.name for file in golden.iterdir()} - {"ema.safetensors"}
    assert {"vit_config.json", "ae.safetensors", "merges.txt"} < names
    assert all((tmp_path / name).read_bytes() == (golden / name).read_bytes() for name in names)
    before, after = (load_file(at / "ema.safetensors") for at in (golden, tmp_path))
    for name, x in before.items():
        trained = policy.network.get_parameter(name).requires_grad
        assert after[name].dtype == (torch.float32 if trained else x.dtype)
        assert torch.equal(after[name].float(), x.float())


def test_what_the_official_loader_overrides_is_ignored(folder):
    changed(folder / "llm_config.json", qk_norm=False, tie_word_embeddings=True, layer_module="X")
    changed(folder / "llm_config.json", rope_scaling=None, sliding_window=4096)
    load_bagel(folder, "", place())


def test_the_table_has_the_side_that_is_stored(folder):
    """Also where ``config.json`` is only a name, as published, and without any weights."""
    (folder / "config.json").write_text('{"name": ["BAGEL"]}')
    assert BagelConfig.read(folder).latent.max_size == 6
    (folder / "ema.safetensors").unlink()
    assert BagelConfig.read(folder).latent.max_size == 64


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("rope_scaling", {"type": "yarn"}, "rope_scaling is {'type': 'yarn'}, only None is"),
        ("rope_parameters", {"rope_theta": 1e6}, "rope_parameters is"),
        ("hidden_act", "gelu", "hidden_act is 'gelu', only 'silu' is"),
        ("use_sliding_window", True, "use_sliding_window is True"),
        ("attention_dropout", 0.1, "attention_dropout is 0.1"),
        ("quantization_config", {"bits": 4}, "quantization_config is"),
        ("head_dim", 16, "head_dim is 16"),
        ("num_attention_heads", 5, "hidden_size 32 is not an even multiple of num_attention_heads"),
        ("num_key_value_heads", 3, "num_attention_heads 4 is not a multiple of num_key_value_he"),
        ("hidden_size", 0, "hidden_size: Input should be greater than 0"),
    ],
)
def test_what_cannot_be_computed_is_refused(folder, field, value, told):
    changed(folder / "llm_config.json", **{field: value})
    assert told in refused(folder)


# --- weights ----------------------------------------------------------------------------------


def test_types_of_trained_and_frozen_weights(folder):
    policy = load_bagel(folder, "", place(torch.bfloat16, "image"))
    experts = policy.parameters()
    assert {p.dtype for p in experts["image"].values()} == {torch.float32}
    assert {p.dtype for p in experts["text"].values()} == {torch.bfloat16}
    assert policy.network.latent_pos_embed.pos_embed.dtype == torch.float32
    stored = load_file(folder / "ema.safetensors")
    state = policy.network.state_dict()
    assert all(torch.equal(x.float(), stored[name].float()) for name, x in state.items())


def test_all_that_does_not_fit_is_named(folder):
    file = folder / "ema.safetensors"
    state = load_file(file)
    state["vae2llm.bias"] = state["vae2llm.bias"][:3]
    state["llm2vae.bias"] = torch.zeros(48, dtype=torch.int32)
    state["eyes.weight"] = torch.zeros(2)
    del state["language_model.lm_head.weight"]
    save_file(state, file)
    said = refused(folder)
    for part in (
        "missing language_model.lm_head.weight (",
        "unexpected eyes.weight",
        "vae2llm.bias is (3,), expected (32,)",
        "llm2vae.bias is of type I32, expected F64 or F32 or F16 or BF16",
    ):
        assert part in said
    for name in [name for name in state if ".self_attn." in name]:
        del state[name]
    save_file(state, file)
    assert said != refused(folder)
    assert refused(folder).endswith("more")
    assert len(refused(folder).splitlines()) == 10


def cut(data):
    return data[: len(data) // 2]


def pointer(data):
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, "bytes, where its header promises"),
        (lambda data: data[:500], "no whole header"),
        (lambda data: b"", "it has 0 bytes"),
        (
            lambda data: data[:8] + b"?" + data[9:],
            "its header is not that of the safetensors format",
        ),
        (lambda data: data.replace(b"BF16", b"F999"), "its header is not that"),
        (pointer, "it is a Git-LFS pointer, not the weights; fetch them by `git lfs pull`"),
    ],
)
def test_damaged_weights(folder, damage, told):
    file = folder / "ema.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    said = refused(folder)
    assert said.startswith(f"{file} is damaged: ")
    assert told in said
    assert notes(BagelOptions(checkpoint=str(folder))) == (said,)


def test_a_folder_without_a_checkpoint_says_what_one_has(tmp_path):
    (tmp_path / "ema.safetensors").touch()
    said = refused(tmp_path)
    assert f"{tmp_path} is no BAGEL checkpoint: it has no llm_config.json" in said
    assert "of these there is ema.safetensors; missing: llm_config.json, vit_config.json" in said


def test_weights_in_several_files(folder):
    (folder / "ema.safetensors").unlink()
    (folder / "ema.safetensors.index.json").write_text("{}")
    assert "holds its weights in several files" in refused(folder)


def test_weights_that_are_not_there(folder):
    (folder / "ema.safetensors").unlink()
    assert refused(folder) == f"{folder} has no ema.safetensors"
    [note] = notes(BagelOptions(checkpoint=str(folder)))
    assert note == f"the weights are not there yet: {folder / 'ema.safetensors'}"


def test_an_autoencoder_that_is_not_there_or_damaged(golden, tmp_path):
    folder = shutil.copytree(golden, tmp_path / "copy")
    options = BagelOptions(checkpoint=str(folder))
    (folder / "ae.safetensors").write_bytes(pointer(b""))
    assert f"{folder / 'ae.safetensors'} is damaged: it is a Git-LFS pointer" in notes(options)[0]
    (folder / "ae.safetensors").unlink()
    assert notes(options) == (f"the autoencoder is not there yet: {folder / 'ae.safetensors'}",)


# --- tokenizer --------------------------------------------------------------------------------


def test_a_tokenizer_that_does_not_fit(golden, tmp_path):
    folder = shutil.copytree(golden, tmp_path / "copy")

    def told(size=300):
        with pytest.raises(UserError) as caught:
            Codec.read(folder, size, 512, "")
        return str(caught.value)

    assert "has ids up to 299, but vocab_size in its llm_config.json is 299" in told(299)
    write_byte_tokenizer(folder, list(SPECIAL)[:2])
    assert "lacks <|vision_start|>, <|vision_end|>, which BAGEL's has" in told()
    (folder / "tokenizer.json").write_text("{")
    assert "has no tokenizer that loads" in told()
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()
    assert f"{folder} has no tokenizer: a BAGEL folder has llm_config.json" in told()


# --- saving -----------------------------------------------------------------------------------


def test_saving_writes_what_the_format_s_library_writes(checkpoint, tmp_path):
    policy = load_bagel(checkpoint, "", place(torch.float32, "text", "image"))
    policy.save(tmp_path)
    expected = save(policy.network.state_dict(), metadata={"format": "pt"})
    assert (tmp_path / "ema.safetensors").read_bytes() == expected


def test_saving_keeps_all_that_was_not_trained(folder, tmp_path):
    """Although the source has gone since. Trained weights are float32; loading gives them back."""
    before = load_file(folder / "ema.safetensors")
    policy = load_bagel(folder, "", place(torch.bfloat16, "image"))
    trained = {name for name, p in policy.network.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in policy.parameters()["image"].values():
            parameter.mul_(1 + 1e-6)
    (folder / "ema.safetensors").unlink()
    saved = tmp_path / "saved"
    policy.save(saved)
    after = load_file(saved / "ema.safetensors")
    assert after.keys() == before.keys()
    assert all(after[name].dtype == torch.float32 for name in trained)
    for name in before.keys() - trained:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])
    assert (saved / "ae.safetensors").read_bytes() == b"an autoencoder"
    again = load_bagel(saved, "", place(torch.bfloat16, "image"))
    state = again.network.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in policy.network.state_dict().items())


def test_a_second_stage_keeps_what_the_first_trained(folder, tmp_path):
    first = load_bagel(folder, "", place(torch.bfloat16, "text"))
    with torch.no_grad():
        for parameter in first.parameters()["text"].values():
            parameter.mul_(1.001)
    first.save(tmp_path / "first")
    second = load_bagel(folder, "", place(torch.bfloat16, "image"))
    second.load(tmp_path / "first")
    second.save(tmp_path / "second")
    one, two = (load_file(tmp_path / n / "ema.safetensors") for n in ("first", "second"))
    assert all(torch.equal(x.float(), two[name].float()) for name, x in one.items())


def test_a_policy_saves_over_its_own_source(folder):
    before = load_file(folder / "ema.safetensors")
    load_bagel(folder, "", place(torch.float32, "text")).save(folder)
    after = load_file(folder / "ema.safetensors")
    assert all(torch.equal(after[name].float(), x.float()) for name, x in before.items())
    assert not list(folder.glob(".partial*"))


def test_a_full_disk_keeps_what_was_there(folder, tmp_path):
    policy = load_bagel(folder, "", place(torch.float32, "text"))
    saved = tmp_path / "saved"
    policy.save(saved)
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    (folder / "ae.safetensors").write_bytes(b"another")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            policy.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == {file.name: file.read_bytes() for file in saved.iterdir()}


# --- where a checkpoint is --------------------------------------------------------------------

HUB = "owner/some-model"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache."""
    cache = tmp_path / "cache" / "hub"
    monkeypatch.setenv("HF_HOME", str(cache.parent))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return cache


def downloaded(cache, checkpoint, revision="main"):
    """A checkpoint in the cache, laid out as the hub's own library does."""
    repository = cache / "models--owner--some-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text("0123abc")
    return Path(shutil.copytree(checkpoint, repository / "snapshots" / "0123abc"))


def test_a_hub_id_is_found_in_the_cache(cache, golden):
    snapshot = downloaded(cache, golden)
    assert Path(snapshot_download(HUB, cache_dir=cache, local_files_only=True)) == snapshot
    for name in (HUB, f"{HUB}@main", f"{HUB}@0123abc"):
        assert local_folder("checkpoint", name, FILES) == snapshot
        assert notes(BagelOptions(checkpoint=name)) == ()
    policy = PROVIDER.build(BagelOptions(checkpoint=HUB), place())
    assert policy.folder == snapshot


@pytest.mark.parametrize("name", [HUB, f"{HUB}@v2"])
def test_a_hub_id_that_is_not_there(cache, golden, name):
    [note] = notes(BagelOptions(checkpoint=name))
    assert note.startswith(f"checkpoint {name!r} is not there yet: there is no such folder beside")
    assert f"cache {cache} lacks llm_config.json, vit_config.json, ema.safetensors, ae.saf" in note
    command = f"hf download {HUB}" + (" --revision v2" if "@" in name else "")
    assert f"`{command}`" in note
    (downloaded(cache, golden, "v2" if "@" in name else "main") / "ema.safetensors").unlink()
    [note] = notes(BagelOptions(checkpoint=name))
    assert f"is not whole yet ({cache}" in note
    assert "lacks ema.safetensors." in note


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (errors.GatedRepoError, f"is gated: accept its terms on https://huggingface.co/{HUB}"),
        (errors.RevisionNotFoundError, "has no revision 'v2' on the hub"),
        (errors.RepositoryNotFoundError, "neither a folder beside the recipe nor a model on"),
        (errors.LocalEntryNotFoundError, "could not be downloaded (LocalEntryNotFoundError"),
        (TimeoutError, f"`hf download {HUB} --revision v2 --local-dir FOLDER`"),
    ],
)
def test_a_download_that_fails_says_what_to_do(cache, monkeypatch, error, told):
    def fail(name, **arguments):
        assert (name, arguments["revision"]) == (HUB, "v2")
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError) as caught:
        PROVIDER.build(BagelOptions(checkpoint=f"{HUB}@v2"), place())
    assert told in str(caught.value)


def test_without_a_network_the_hub_s_library_is_asked_and_its_error_told(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="could not be downloaded") as caught:
        PROVIDER.build(BagelOptions(checkpoint=HUB), place())
    assert f"`hf download {HUB} --local-dir FOLDER`" in str(caught.value)


def test_a_download_is_loaded(cache, golden, monkeypatch):
    def fetch(name, **arguments):
        assert arguments["cache_dir"] == cache
        assert {file.name for file in golden.iterdir()} <= {*arguments["allow_patterns"]}
        return str(downloaded(cache, golden))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    policy = PROVIDER.build(BagelOptions(checkpoint=HUB), place())
    assert policy.folder == local_folder("checkpoint", HUB, FILES)


def test_an_id_in_a_recipe_is_a_folder_where_one_stands_beside_it(
    cache, checkpoint, tmp_path, monkeypatch
):
    def stated(name):
        resolved = load_recipe(file, catalog(), ())
        assert resolved.recipe.policy.options.checkpoint == name

    recipe(tmp_path, Path(HUB))
    file = tmp_path / "tiny.toml"
    stated(HUB)
    shutil.copytree(checkpoint, tmp_path / HUB)
    stated(str(tmp_path / HUB))
    monkeypatch.chdir(tmp_path)
    file = Path("tiny.toml")
    stated(str(tmp_path / HUB))
    shutil.rmtree(tmp_path / "owner")
    stated(HUB)


def test_check_says_offline_that_a_checkpoint_is_not_there(cache, tmp_path):
    recipe(tmp_path, Path(HUB))
    script = (
        "import sys; from unigrpo_core.cli import main\n"
        "try: main(['check', sys.argv[1]])\n"
        "finally: assert not {'torch', 'huggingface_hub'} & {*sys.modules}"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "tiny.toml")],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "1000"},
    )
    assert f"checkpoint '{HUB}' is not there yet" in done.stdout + done.stderr
    assert "Error" not in done.stderr


# --- memory -----------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="the resident memory is read from /proc")
def test_loading_takes_little_more_than_the_weights():
    """The figure of benchmarks/bench_loading.py."""
    bench = Path(__file__).parents[1] / "benchmarks" / "bench_loading.py"
    done = subprocess.run([sys.executable, bench, "bf16"], stdout=subprocess.PIPE, check=True)
    figures = json.loads(done.stdout)
    assert 0.8 < figures["peak"] <= 1.1


def test_control_tokens_in_a_prompt_are_refused_and_an_end_of_text_is_read(tmp_path):
    codec = Codec.read(as_published(tmp_path / "BAGEL"), 300, 512, "")
    with pytest.raises(UserError, match=r"<\|im_end\|> in a text would steer the model"):
        codec.wrap("a cat<|im_end|>")
    ids = codec.wrap("a<|endoftext|>b")
    assert len(ids) > 4
    assert not set(ids[1:-1]) & {codec.bos, codec.eos, codec.image_start, codec.image_end}
