"""``check --memory`` of painters, language models and pairs of them: against torch's own counter,
real tensors, what autograd keeps, and the counts of a run. All models are tiny, of real classes."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import tiny_lm
import tiny_painters
import torch
from diffusers import SD3Transformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from unigrpo_models.adapters import Adapters
from unigrpo_models.causal.account import ACTIVATIONS as OF_TEXTS
from unigrpo_models.causal.counted import Counted
from unigrpo_models.causal.options import PROJECTIONS
from unigrpo_models.painters.account import ACTIVATIONS
from unigrpo_models.painters.counted import FLUX, SANA, SD3, Tokens
from unigrpo_models.targets import bind

from unigrpo_core.catalog import load_catalog
from unigrpo_core.cli import main, memory
from unigrpo_core.engine.loop import Run
from unigrpo_core.engine.setup import build_setup
from unigrpo_core.errors import UserError
from unigrpo_core.recipe import load_recipe
from unigrpo_core.recipe.workload import workload
from unigrpo_core.workload import Account

KINDS = {"sd3": SD3, "flux": FLUX, "sana": SANA}
GUIDED = "image.guidance={use='cfg', scale=2.0, interval=[0.4, 0.9]}"

RECIPE = """\
title = "an account"
steps = 1
prompts = 2
{shape}
updates = {{ count = 1 }}
source = {{ use = "file", path = "prompts.txt" }}
rewards = [{{ use = "random" }}]
advantage = {{ use = "group_norm" }}

policy = {policy}

[text]
lr = 1e-3
max_tokens = 6
objective = {{ use = "grpo" }}

[image]
lr = 1e-3
size = [24, 32]
objective = {{ use = "flow_grpo", ratio_norm = true }}
scheduler = {{ use = "flow_sde", steps = 4, noise_level = 0.7 }}
window = {{ use = "random", size = 2, range = [0, 3] }}
guidance = {{ use = "none" }}
regularizers = [{{ use = "velocity_mse", weight = 0.1 }}]

[evaluation]
every = 0
final_prompts = 1
sheet = 0
scheduler = {{ use = "ode", steps = 1 }}
guidance = {{ use = "none" }}

[compute]
device = "cpu"
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    at = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        getattr(tiny_painters, f"write_{kind}")(at / kind)
    tiny_lm.write(at / "lm")
    return at


@pytest.fixture
def recipe(models, tmp_path):
    """``recipe("sd3")`` draws, ``recipe("lm")`` writes, ``recipe("pair")`` is of sd3 and lm."""
    (tmp_path / "prompts.txt").write_text("".join(f"{word} cat\n" for word in "abcdefgh"))

    def recipe(name, *overrides):
        at = {key: json.dumps(str(models / key)) for key in (*KINDS, "lm")}
        said = f'{{ use = "hf_causal_lm", checkpoint = {at["lm"]} }}'
        drawn = {
            kind: f'{{ use = "{kind}", checkpoint = {at[kind]}, max_text_tokens = 12 }}'
            for kind in KINDS
        }
        both = f'{{ use = "composed", text = {said}, image = {drawn["sd3"]} }}'
        written, painted = ('episode = ["think"]', "text"), ('episode = ["draw"]', "image")
        episode, part = {"lm": written, "pair": ("", "")}.get(name, painted)
        shape = "group = { fan_out = [4] }" if part else "group = { fan_out = [2, 1] }"
        shape = f'{episode}\ntrain = ["{part}"]\n{shape}' if part else shape
        file = tmp_path / "recipe.toml"
        policy = {"lm": said, "pair": both, **drawn}[name]
        file.write_text(RECIPE.format(policy=policy, shape=shape))
        return load_recipe(file, load_catalog(), overrides)

    return recipe


@pytest.fixture
def account(recipe):
    def account(name, *overrides):
        found = memory.take(recipe(name, *overrides), 6)
        assert isinstance(found, Account), found
        return found

    return account


# --- FLOPs ------------------------------------------------------------------------------------


def counted(call):
    """By torch; with the plain kernel attention's gradient is twice its forward."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def condition(kind, painter):
    """Of one text, random; what the encoders make of it costs nothing here."""
    return painter.encode(["a red cat"])


def shapes_of(network):
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): tuple(x.shape)
        for name, x in network.state_dict().items()
        if ".lora_" not in name
    }


@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_a_velocity_are_those_that_torch_counts(recipe, kind):
    policy = build_setup(recipe(kind)).policy
    painter, transformer = policy.painter, KINDS[kind]
    network, text = painter.network, condition(kind, painter)
    x, t = torch.randn(1, *painter.latent_shape((24, 32))), torch.ones(1)
    long = text["text"].shape[1]
    each = Tokens(painter.image_tokens((24, 32)) - long, long)
    sizes = (shapes_of(network), network.config, each)
    run = lambda: painter.velocity(network, x, t, text)  # noqa: E731
    with torch.no_grad():
        assert transformer.forward(*sizes) == counted(run)
    both = counted(lambda: run().square().sum().backward())
    # torch counts the gradient of a depthwise convolution's weights as if it were a full one.
    deep = [s for s in sizes[0].values() if len(s) == 4 and s[1] == 1 and s[0] > 1]
    extra = sum(2 * 9 * each.image * s[0] * (s[0] - 1) for s in deep)
    assert transformer.training(*sizes, attention_backward=2.0) == both - extra


@pytest.mark.parametrize("kind", KINDS)
def test_flops_with_adapters_are_nearly_those_that_torch_counts(recipe, kind):
    """Two layers; what the adapters multiply is not counted, and of the first block sd3's second
    attention is, though it needs no gradient: a 24th of it in the published model."""
    policy = build_setup(recipe(kind, "policy.lora_rank=1")).policy
    painter, transformer = policy.painter, KINDS[kind]
    text = condition(kind, painter)
    x, t = torch.randn(1, *painter.latent_shape((24, 32))), torch.ones(1)
    long = text["text"].shape[1]
    each = Tokens(painter.image_tokens((24, 32)) - long, long)
    found = counted(lambda: painter.velocity(painter.network, x, t, text).sum().backward())
    expected = transformer.training(
        shapes_of(painter.network),
        painter.network.config,
        each,
        adapted=True,
        attention_backward=2.0,
    )
    assert expected == pytest.approx(found, rel=0.07)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_flops_of_a_text_are_those_that_torch_counts(tmp_path, kind):
    model = AutoModelForCausalLM.from_pretrained(tiny_lm.write(tmp_path / kind, kind))
    sizes = Counted(json.loads((tmp_path / kind / "config.json").read_text()), shapes_of(model))
    ids = torch.arange(3 * 7).view(3, 7)
    run = lambda: model(ids, use_cache=False).logits  # noqa: E731
    assert sizes.forward(3, 7, 21, rectangles=True) == counted(run)
    options = {"rectangles": True, "attention_backward": 2.0}
    both = counted(lambda: run().square().sum().backward())
    assert sizes.training(3, 7, 21, **options) == both
    again = sizes.training(1, 7, 0, recompute=True) - sizes.training(1, 7, 0)
    assert again == sizes.forward(1, 7, 0)
    assert sizes.step(1, 7) == pytest.approx(sizes.forward(1, 7, 1) - sizes.forward(1, 6, 0))


def test_of_a_mixture_s_experts_only_those_count_that_are_asked():
    config = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "vocab_size": 5}
    shapes = {"model.layers.0.q_proj.weight": (8, 8)}
    for number in range(4):
        shapes[f"model.layers.0.mlp.experts.{number}.up_proj.weight"] = (16, 8)
    plain = Counted(config, shapes)
    mixed = Counted({**config, "num_experts": 4, "num_experts_per_tok": 1}, shapes)
    assert plain.macs - mixed.macs == 3 * 8 * 16
    assert plain.size == mixed.size


# --- memory -----------------------------------------------------------------------------------


def parts_of(found):
    return {part.name: part.bytes for part in found.memory}


@pytest.mark.parametrize(
    ("name", "rank"), [("sd3", 0), ("sd3", 2), ("flux", 2), ("sana", 0), ("lm", 0), ("lm", 2)]
)
def test_bytes_are_those_of_the_tensors(recipe, account, name, rank):
    option = (f"policy.lora_rank={rank}",)
    setup = build_setup(recipe(name, *option))
    policy, found = setup.policy, parts_of(account(name, *option))
    network = policy.network.model if name == "lm" else policy.painter.network
    tensors = {x.data_ptr(): x.nbytes for x in network.state_dict().values()}
    trained = sum(p.nbytes for p in network.parameters() if p.requires_grad)
    assert found["weights"] == sum(tensors.values())
    assert (found["gradients"], found["optimizer"]) == (trained, 2 * trained)
    if name != "lm":
        assert found.get("reference", 0) == (0 if rank else trained)
        encoders = sum(p.nbytes for part in policy.painter._encoders for p in part.parameters())
        assert found["text encoders"] == encoders
        pixels = policy.painter._autoencoder.parameters()
        assert found["autoencoder"] == sum(p.nbytes for p in pixels)


def test_what_is_not_loaded_and_what_waits_on_the_host(account):
    plain = account("sd3")
    bare = account("sd3", "policy.text_encoder_3=false")
    assert parts_of(bare)["text encoders"] < parts_of(plain)["text encoders"]
    hosted = account("sd3", "policy.text_encoders='host'")
    assert hosted.host == parts_of(plain)["text encoders"]
    frozen = parts_of(account("pair", "train=['text']"))
    assert {"text: optimizer", "image: weights"} <= frozen.keys()
    assert "image: optimizer" not in frozen


@pytest.mark.parametrize(("size", "adapters"), list(ACTIVATIONS))
def test_activations_are_about_what_autograd_keeps(size, adapters):
    """Of blocks with heads as wide as in published models: the difference of two networks."""
    each, held, numbers = Tokens(64, 20), [], []

    def painted(network):
        network(
            torch.randn(1, 16, 16, 16),
            encoder_hidden_states=torch.randn(1, each.text, 64),
            pooled_projections=torch.randn(1, 8),
            timestep=torch.ones(1),
        )

    for layers in (2, 4):
        network = SD3Transformer2DModel(
            num_layers=layers,
            num_attention_heads=2,
            caption_projection_dim=128,
            joint_attention_dim=64,
            pooled_projection_dim=8,
            pos_embed_max_size=16,
            dual_attention_layers=tuple(range(layers // 2)),
            qk_norm="rms_norm",
        )
        matrices = {
            name: shape
            for name, shape in shapes_of(network).items()
            if "blocks." in name and name.endswith("weight") and len(shape) == 2
        }
        if adapters:
            adapt(network, SD3.targets, matrices, size)
        held.append(kept(network, size, painted))
        numbers.append(sum(SD3.tokens(name, each) * sum(x) for name, x in matrices.items()))
    expected = ACTIVATIONS[size, adapters] * (numbers[1] - numbers[0])
    assert expected == pytest.approx(held[1] - held[0], rel=1 / 6)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize(("size", "adapters"), list(OF_TEXTS))
def test_activations_of_a_text_likewise(kind, size, adapters):
    held, numbers = [], []
    for layers in (2, 4):
        sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": layers}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 60}
        family = {
            "qwen3": (Qwen3Config, Qwen3ForCausalLM),
            "llama": (LlamaConfig, LlamaForCausalLM),
        }
        config, made = family[kind]
        model = made(config(**sizes, head_dim=64))
        counted = Counted(model.config.to_dict(), shapes_of(model))
        if adapters:
            adapt(model, PROJECTIONS, [name for name, *_ in counted.matrices], size)
        ids = torch.arange(50)[None]
        held.append(kept(model, size, lambda model, ids=ids: model.model(ids, use_cache=False)[0]))
        numbers.append(50 * sum(sum(shape) for _, shape, _ in counted.matrices))
    expected = OF_TEXTS[size, adapters] * (numbers[1] - numbers[0])
    assert expected == pytest.approx(held[1] - held[0], rel=1 / 6)


def adapt(network, targets, matrices, size):
    """Adapters beside a frozen network in the type of computing."""
    network.to(torch.bfloat16 if size == 2 else torch.float32).requires_grad_(False)
    Adapters(network, bind("x", targets, [n.removesuffix(".weight") for n in matrices]), 2, 2)


def kept(network, size, call):
    """Bytes that autograd keeps of a pass, without the weights and what autocast casts of them."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    cast = {tuple(p.shape)[::turn] for p in network.parameters() for turn in (1, -1)}
    found, alive = {}, []

    def pack(x):
        storage = x.untyped_storage()
        weight = x.dtype == torch.bfloat16 and x.ndim == 2 and tuple(x.shape) in cast
        if storage.data_ptr() not in own and not weight:
            found[storage.data_ptr()] = storage.nbytes()
        alive.append(x)
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=size == 2),
    ):
        alive.append(call(network))
    return sum(found.values())


def test_what_is_computed_again_is_not_kept(account):
    for name in ("sd3", "lm"):
        modes = ("none", "selective", "full")
        kept = [
            parts_of(account(name, f"compute.checkpointing='{mode}'"))["activations"]
            for mode in modes
        ]
        assert kept[2] < kept[1] <= kept[0]


# --- calls, and a pair ------------------------------------------------------------------------


def test_network_calls_are_those_of_a_run(recipe, account, tmp_path):
    options = (GUIDED, "compute.replay_tokens=200")
    Run(recipe("sd3", *options), tmp_path / "run", tiny.Silent())()
    [row] = tiny.lines(tmp_path / "run")
    [calls] = account("sd3", *options).calls
    assert calls.total + calls.first_step == row["network_calls"]


def test_a_pair_s_account_is_that_of_its_parts(recipe, account):
    found = account("pair")
    image = replace(workload(recipe("pair").recipe, 6), train=frozenset({"image"}))
    options = recipe("pair").recipe.policy.image.options
    from unigrpo_models.painters.account import account as drawn

    alone = drawn(SD3, options, image)
    mine = {k.removeprefix("image: "): v for k, v in parts_of(found).items() if "image: " in k}
    assert mine == parts_of(alone)
    assert found.calls == alone.calls
    assert {"text: writing", "text: forward and backward", "image: denoising"} <= found.work.keys()
    assert any("every thought has 6 tokens" in line for line in found.assumptions)
    # A replay has fewer texts where it also has images.
    few, many = (account("pair", f"compute.replay_tokens={n}") for n in (200, 10_000))
    assert parts_of(few)["text: activations"] < parts_of(many)["text: activations"]


# --- the command ------------------------------------------------------------------------------


def test_the_table_loads_no_torch(recipe, tmp_path):
    recipe("pair")
    code = (
        "import sys; from unigrpo_core.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(9 if {'torch', 'diffusers', 'transformers'} & set(sys.modules) else code)"
    )
    argv = [sys.executable, "-c", code, "check", str(tmp_path / "recipe.toml"), "--memory"]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    for line in ("text: weights", "image: text encoders", "image: activations", "sampling"):
        assert line in done.stdout


def test_weights_that_are_not_there_yet_are_named(recipe, models, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    for part, name in (("image", "sd35/no_cfg_mse"), ("text", "qwen3_sd35/unigrpo")):
        assert main(["check", name, "--memory"]) == 0
        out = capsys.readouterr().out
        assert "sizes are read from the weights' headers: checkpoint 'stabilityai/" in out
        assert ("policy.image: " in out) == (part == "text")


def test_sizes_that_do_not_fit(account):
    with pytest.raises(UserError, match="image width 30: this model draws multiples of 4"):
        account("sd3", "image.size=[24, 30]")
    with pytest.raises(UserError, match="lora_image names 'to_z'"):
        account("sd3", "policy.lora_rank=1", "policy.lora_image=['to_z']")


def test_a_model_whose_sizes_have_other_names(models, recipe):
    file = models / "lm" / "config.json"
    before = file.read_text()
    try:
        tiny_lm.change(models / "lm", "config.json", hidden_size=None)
        found = memory.take(recipe("lm"), 6)
    finally:
        file.write_text(before)
    assert str(found).endswith("its configuration does not state hidden_size")


def test_a_pipeline_of_another_kind(models, account):
    with pytest.raises(UserError, match="its transformer is a FluxTransformer2DModel"):
        account("sd3", f"policy.checkpoint='{models / 'flux'}'")
